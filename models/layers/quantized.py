"""Weights of 8 bits: how they are made and multiplied. Knows no layer; `linear` comes here when a weight is quantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import LogicalAxes
from jaxserve.pallas_kernels import quantized_rows
from jaxserve.pallas_kernels.paged_attention import Implementation

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0  # largest e4m3 number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8Weight:
    """A matmul's weight in e4m3, with a scale for each output channel.

    Attributes:
        values: [*batch, *out, *in], the inputs last: the GPU's 8-bit matrix products read both sides along the contracted axis.
        scales: [*batch, *out] in float32; the weight is values * scales.
        input_scale: [], what activations are divided by before they are rounded; each token has its own where this is None.
        rounding: the back end that rounds the activations, where each token has its own scale.
    """

    values: Float[Array, ...]
    scales: Float[Array, ...]
    input_scale: Array | None = None  # of any kind: specifications of shardings take its place
    rounding: Implementation = field(default="xla", metadata={"static": True})

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel rounds what meets this weight, and may do so together with what comes before."""
        return self.rounding == "mosaic_gpu" and self.input_scale is None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8Rows:
    """Activations in e4m3, with a scale for each token: rounded before they come to `linear`.

    Attributes:
        values: [T, *in].
        scales: [T] in float32.
        dtype: of the activations that they stand for.
    """

    values: Float[Array, "T ..."]
    scales: Float[Array, " T"]
    dtype: DTypeLike = field(metadata={"static": True})


def fp8_layout(
    shape: tuple[int, ...], axes: LogicalAxes, contract: int, batch: int = 0
) -> tuple[tuple[tuple[int, ...], LogicalAxes], ...]:
    """Shape and logical axes of values and scales, for a weight [*batch, *in, *out] with `contract` input axes."""
    order = inputs_last(len(shape), contract, batch)
    kept = order[: len(shape) - contract]
    return tuple((tuple(shape[i] for i in part), tuple(axes[i] for i in part)) for part in (order, kept))


def inputs_last(ndim: int, contract: int, batch: int = 0) -> tuple[int, ...]:
    """The order of axes that makes [*batch, *out, *in] of [*batch, *in, *out]."""
    return (*range(batch), *range(batch + contract, ndim), *range(batch, batch + contract))


def put_inputs_last(w: Float[Array, ...], contract: int, batch: int = 0) -> Float[Array, ...]:
    """[*batch, *in, *out] as [*batch, *out, *in]."""
    return w.transpose(inputs_last(w.ndim, contract, batch))


def quantize_fp8(w: Float[Array, ...], contract: int, batch: int = 0) -> Fp8Weight:
    """Rounds a weight [*batch, *in, *out] to e4m3, the largest value of each output channel to 448."""
    w = put_inputs_last(w.astype(jnp.float32), contract, batch)
    scales = _scale(w, tuple(range(w.ndim - contract, w.ndim)))
    return Fp8Weight((w / scales).astype(FP8), scales.reshape(w.shape[: w.ndim - contract]))


def linear_fp8(x: Float[Array, "T ..."] | Fp8Rows, w: Fp8Weight, contract: int, out_dtype: DTypeLike) -> Float[Array, "T ..."]:
    """x times w, the activations rounded to e4m3 with a scale for each token (as vLLM's dynamic per-token fp8) or w's own."""
    y, x_scales = multiply_fp8(x, w, contract)
    x_scales = x_scales.reshape(x_scales.shape[: y.ndim - w.scales.ndim] + (1,) * w.scales.ndim)
    return (y.astype(jnp.float32) * x_scales * w.scales).astype(out_dtype)


def multiply_fp8(
    x: Float[Array, "T ..."] | Fp8Rows, w: Fp8Weight, contract: int = 1
) -> tuple[Float[Array, "T ..."], Float[Array, "T ..."]]:
    """e4m3 times e4m3, and x's scales, [T] or [T, 1, ...] or w's own [], which with w's are yet to be applied."""
    values, x_scales = rounded(x, w, contract)
    axes = tuple(range(values.ndim - contract, values.ndim)), tuple(range(w.scales.ndim, w.values.ndim))
    # A GPU's 8-bit product gives bfloat16, its sums being float32; the scales are applied in float32.
    wanted = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32
    return jax.lax.dot_general(values, w.values, (axes, ((), ())), preferred_element_type=wanted), x_scales


def gated_fp8(x: Float[Array, "T D"] | Fp8Rows, up: Fp8Weight, activation: Callable[[Array], Array]) -> Fp8Rows:
    """activation(gate) * linear of x's products with `up` [D, 2, F], rounded for the next product without having been stored."""
    y, x_scales = multiply_fp8(x, up)
    hidden = quantized_rows.quantize_gated(y, x_scales.reshape(-1), up.scales, activation, up.rounding)
    return Fp8Rows(*hidden, dtype=x.dtype)


def have_kernels(weights: Sequence[Any]) -> TypeGuard[Sequence[Fp8Weight]]:
    """Whether all of some weights are of 8 bits and have a kernel that rounds what meets them."""
    return all(isinstance(w, Fp8Weight) and w.has_kernel for w in weights)


def rounded(x: Float[Array, "T ..."] | Fp8Rows, w: Fp8Weight, contract: int) -> tuple[Array, Array]:
    """x in e4m3 for w, and its scales: [T] or [T, 1, ...], or w's own."""
    if isinstance(x, Fp8Rows):
        return x.values, x.scales
    wide = x.astype(jnp.float32)
    if w.input_scale is not None:
        return jnp.clip(wide / w.input_scale, -FP8_MAX, FP8_MAX).astype(FP8), w.input_scale
    if w.has_kernel and x.ndim == contract + 1:
        values, scales = quantized_rows.quantize(x.reshape(x.shape[0], -1), w.rounding)
        return values.reshape(x.shape), scales
    scales = _scale(wide, tuple(range(x.ndim - contract, x.ndim)))
    return (wide / scales).astype(FP8), scales


def dequantized(w: Float[Array, ...] | Fp8Weight, input_axis: int, dtype: DTypeLike) -> Float[Array, ...]:
    """A weight with one input axis as a product that takes no 8 bits wants it."""
    if not isinstance(w, Fp8Weight):
        return w
    return jnp.moveaxis((w.values.astype(jnp.float32) * w.scales[..., None]).astype(dtype), -1, input_axis)


def _scale(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), 1e-12) / FP8_MAX
