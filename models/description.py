"""ModelDescription: a model's parameters and its pure forward function, before and apart from any weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.decoder import abstract_decoder
from jaxserve.models.interface import AnyCacheSpec, LogicalAxes, Runtime, StepBatch
from jaxserve.models.spec import DecoderSpec


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        path: where it is in the module, such as "layers.3.mixer.qkv".
        mean, std: of the values that dummy weights take.
    """

    path: str
    abstract: jax.ShapeDtypeStruct
    axes: LogicalAxes
    mean: float
    std: float


@dataclass(frozen=True)
class ModelDescription:
    """What can be compiled without weights.

    Attributes:
        name: of the architecture.
        parameters: in the order in which apply takes their arrays.
        cache_specs: of all layers, in the order in which apply takes the caches; a layer may have none, or several.
    """

    name: str
    spec: DecoderSpec
    parameters: tuple[Parameter, ...]
    cache_specs: tuple[AnyCacheSpec, ...]
    graphdef: nnx.GraphDef[Any]
    treedef: jax.tree_util.PyTreeDef

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest context that the model is made for, in tokens."""
        return self.spec.max_position

    @property
    def abstract(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of each parameter."""
        return tuple(p.abstract for p in self.parameters)

    @property
    def logical_axes(self) -> tuple[LogicalAxes, ...]:
        """Logical axes of each parameter."""
        return tuple(p.axes for p in self.parameters)

    def apply(
        self, weights: Sequence[Array], batch: StepBatch, caches: tuple[Array, ...], runtime: Runtime
    ) -> tuple[Float[Array, "S V"], tuple[Array, ...]]:
        """Decoder.__call__ as a pure function of the weights, to be traced: the module exists at trace time only."""
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))
        logits, new_caches = model(batch, caches, runtime)
        return logits, new_caches


def describe_decoder(name: str, spec: DecoderSpec, dtype: DTypeLike) -> ModelDescription:
    """Lays out the parameters of `spec` in `dtype`; allocates nothing."""
    decoder = abstract_decoder(spec, dtype)
    graphdef, state = nnx.split(decoder)
    leaves, treedef = jax.tree.flatten(state)
    parameters = tuple(
        _parameter(".".join(map(str, path)), variable, leaf)
        for (path, variable), leaf in zip(nnx.to_flat_state(state), leaves, strict=True)
    )
    return ModelDescription(name, spec, parameters, decoder.cache_specs(), graphdef, treedef)


def _parameter(path: str, variable: nnx.Variable[Any], leaf: jax.ShapeDtypeStruct) -> Parameter:
    meta = variable.get_metadata()
    return Parameter(path, leaf, meta["logical_axes"], meta["mean"], meta["std"])
