"""ModelDescription: a model's parameters and its pure forward function, before and apart from any weights.

A parameter is what a checkpoint has; the forward function takes its arrays: one, or two where it is quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.decoder import abstract_decoder
from jaxserve.models.interface import AnyCacheSpec, LogicalAxes, Runtime, StepBatch
from jaxserve.models.layers.linear import OutputsFirst
from jaxserve.models.layers.quantized import FP8, Fp8Weight, fp8_layout
from jaxserve.models.spec import DecoderSpec
from jaxserve.pallas_kernels.paged_attention import Implementation

Quantization = Literal["fp8"]
Form = Literal["plain", "outputs_first", "fp8", "fp8_static"]
"""How a parameter is held: as it is; with its input axes last, as an OutputsFirst; as an Fp8Weight; as one with an input_scale."""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        path: where it is in the module, such as "layers.3.mixer.qkv".
        abstract: its shape and dtype before it is quantised.
        mean, std: of the values that dummy weights take.
        contract: how many axes meet the input, where it may be quantised; else None.
        batch: axes before those.
        inputs: how many leading axes meet the input, where it may be held outputs first.
    """

    path: str
    abstract: jax.ShapeDtypeStruct
    axes: LogicalAxes
    mean: float
    std: float
    contract: int | None = None
    batch: int = 0
    inputs: int | None = None
    form: Form = "plain"

    @property
    def is_quantized(self) -> bool:
        return self.form in ("fp8", "fp8_static")

    @property
    def turned(self) -> int:
        """How many leading axes of `abstract` come last in the one array that it is held as."""
        return (self.inputs or 0) if self.form == "outputs_first" else 0

    @property
    def unquantized(self) -> tuple[jax.ShapeDtypeStruct, LogicalAxes]:
        """The array, perhaps turned, that is held as it is or quantised."""
        (shape, axes), _ = fp8_layout(self.abstract.shape, self.axes, self.turned)
        return jax.ShapeDtypeStruct(shape, self.abstract.dtype), axes

    @property
    def parts(self) -> tuple[str, ...]:
        """What follows the path in the name of each of its arrays."""
        if not self.is_quantized:
            return ("",)
        return (".values", ".scales", ".input_scale") if self.form == "fp8_static" else (".values", ".scales")

    @property
    def arrays(self) -> tuple[tuple[jax.ShapeDtypeStruct, LogicalAxes], ...]:
        """What the forward function takes for it: the parameter, perhaps turned, or its 8-bit values and their scales."""
        if not self.is_quantized or self.contract is None:
            return (self.unquantized,)
        layout = (*fp8_layout(self.abstract.shape, self.axes, self.contract, self.batch), ((), ()))
        dtypes = (FP8, jnp.float32, jnp.float32)
        return tuple((jax.ShapeDtypeStruct(s, d), a) for (s, a), d, _ in zip(layout, dtypes, self.parts, strict=False))

    def value(self, arrays: Iterator[Array], rounding: Implementation) -> Array | Fp8Weight | OutputsFirst:
        """What the module holds, from the next of these.

        Args:
            rounding: the back end that rounds what meets a quantised one.
        """
        own = [next(arrays) for _ in self.parts]
        if self.is_quantized:
            return Fp8Weight(own[0], own[1], own[2] if len(own) > 2 else None, rounding)
        return OutputsFirst(own[0]) if self.form == "outputs_first" else own[0]


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
        values = [parameter.value(arrays, runtime.rounding) for parameter in self.parameters]
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, values))
        logits, new_caches = model(batch, caches, runtime)
        return logits, new_caches


def describe_decoder(
    name: str, spec: DecoderSpec, dtype: DTypeLike, quantization: Quantization | None = None, *, outputs_first: bool = False
) -> ModelDescription:
    """Lays out the parameters of `spec` in `dtype`, those of the layers' matmuls quantised if asked for; allocates nothing.

    Args:
        outputs_first: hold matmuls' weights as checkpoints do, which suits CPUs.
    """
    decoder = abstract_decoder(spec, dtype)
    graphdef, state = nnx.split(decoder)
    leaves, treedef = jax.tree.flatten(state)
    parameters = tuple(
        _parameter(".".join(map(str, path)), variable, leaf, quantization, outputs_first)
        for (path, variable), leaf in zip(nnx.to_flat_state(state), leaves, strict=True)
    )
    return ModelDescription(name, spec, parameters, decoder.cache_specs(), graphdef, treedef)


def _parameter(
    path: str, variable: nnx.Variable[Any], leaf: jax.ShapeDtypeStruct, quantization: Quantization | None, outputs_first: bool
) -> Parameter:
    meta = variable.get_metadata()
    contract, batch, inputs = meta["contract"], meta["batch"], meta["inputs"]
    form: Form = "outputs_first" if outputs_first and inputs is not None else "plain"
    # Experts are dequantised in every step, as their products take no 8 bits: that pays only where a checkpoint has them so.
    if quantization and contract is not None and not batch:
        form = "fp8"
    return Parameter(path, leaf, meta["logical_axes"], meta["mean"], meta["std"], contract, batch, inputs, form)
