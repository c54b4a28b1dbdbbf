"""ModelDescription: a model's parameters and its pure forward function, before and apart from any weights.

A parameter is what a checkpoint has; the forward function takes its arrays: one, or two where it is quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.decoder import abstract_decoder
from jaxserve.models.interface import AnyCacheSpec, LogicalAxes, Runtime, StepBatch
from jaxserve.models.layers.quantized import FP8, Fp8Weight, fp8_layout
from jaxserve.models.spec import DecoderSpec

Quantization = Literal["fp8"]


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        path: where it is in the module, such as "layers.3.mixer.qkv".
        abstract: its shape and dtype before it is quantised.
        mean, std: of the values that dummy weights take.
        contract: how many leading axes meet the input, where it is quantised; else None.
    """

    path: str
    abstract: jax.ShapeDtypeStruct
    axes: LogicalAxes
    mean: float
    std: float
    contract: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """What follows the path in the name of each of its arrays."""
        return ("",) if self.contract is None else (".values", ".scales")

    @property
    def arrays(self) -> tuple[tuple[jax.ShapeDtypeStruct, LogicalAxes], ...]:
        """What the forward function takes for it: the parameter, or its 8-bit values and their scales."""
        if self.contract is None:
            return ((self.abstract, self.axes),)
        layout = fp8_layout(self.abstract.shape, self.axes, self.contract)
        return tuple((jax.ShapeDtypeStruct(s, d), a) for (s, a), d in zip(layout, (FP8, jnp.float32), strict=True))


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
    def paths(self) -> tuple[str, ...]:
        """A name for each array that apply takes: its parameter's path, with .values and .scales where it is quantised."""
        return tuple(p.path + part for p in self.parameters for part in p.parts)

    @property
    def abstract(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of each array that apply takes."""
        return tuple(abstract for p in self.parameters for abstract, _ in p.arrays)

    @property
    def logical_axes(self) -> tuple[LogicalAxes, ...]:
        """Logical axes of each array that apply takes."""
        return tuple(axes for p in self.parameters for _, axes in p.arrays)

    def apply(
        self, weights: Sequence[Array], batch: StepBatch, caches: tuple[Array, ...], runtime: Runtime
    ) -> tuple[Float[Array, "S V"], tuple[Array, ...]]:
        """Decoder.__call__ as a pure function of the weights, to be traced: the module exists at trace time only."""
        arrays = iter(weights)
        values = [next(arrays) if p.contract is None else Fp8Weight(next(arrays), next(arrays)) for p in self.parameters]
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, values))
        logits, new_caches = model(batch, caches, runtime)
        return logits, new_caches


def describe_decoder(
    name: str, spec: DecoderSpec, dtype: DTypeLike, quantization: Quantization | None = None
) -> ModelDescription:
    """Lays out the parameters of `spec` in `dtype`, those of the layers' matmuls quantised if asked for; allocates nothing."""
    decoder = abstract_decoder(spec, dtype)
    graphdef, state = nnx.split(decoder)
    leaves, treedef = jax.tree.flatten(state)
    parameters = tuple(
        _parameter(".".join(map(str, path)), variable, leaf, quantization)
        for (path, variable), leaf in zip(nnx.to_flat_state(state), leaves, strict=True)
    )
    return ModelDescription(name, spec, parameters, decoder.cache_specs(), graphdef, treedef)


def _parameter(
    path: str, variable: nnx.Variable[Any], leaf: jax.ShapeDtypeStruct, quantization: Quantization | None
) -> Parameter:
    meta = variable.get_metadata()
    contract = meta["contract"] if quantization else None
    return Parameter(path, leaf, meta["logical_axes"], meta["mean"], meta["std"], contract)
