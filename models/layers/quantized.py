"""Weights of 8 bits: how they are made and multiplied. Knows no layer; `linear` comes here when a weight is quantised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import LogicalAxes

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
    """

    values: Float[Array, ...]
    scales: Float[Array, ...]
    input_scale: Float[Array, ""] | None = None


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


def linear_fp8(x: Float[Array, "T ..."], w: Fp8Weight, contract: int, out_dtype: DTypeLike) -> Float[Array, "T ..."]:
    """x times w, the activations rounded to e4m3 with a scale for each token (as vLLM's dynamic per-token fp8) or w's own."""
    x_axes = tuple(range(x.ndim - contract, x.ndim))
    w_axes = tuple(range(w.values.ndim - contract, w.values.ndim))
    wide = x.astype(jnp.float32)
    if w.input_scale is None:
        x_scales = _scale(wide, x_axes)
        rounded = (wide / x_scales).astype(FP8)
        x_scales = x_scales.reshape(x.shape[: x.ndim - contract] + (1,) * w.scales.ndim)
    else:
        x_scales = w.input_scale
        rounded = jnp.clip(wide / x_scales, -FP8_MAX, FP8_MAX).astype(FP8)
    multiply = partial(jax.lax.dot_general, dimension_numbers=((x_axes, w_axes), ((), ())))
    # A GPU's 8-bit product gives bfloat16, its sums being float32; the scales are applied in float32.
    y = multiply(rounded, w.values, preferred_element_type=jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32)
    return (y.astype(jnp.float32) * x_scales * w.scales).astype(out_dtype)


def dequantized(w: Float[Array, ...] | Fp8Weight, input_axis: int, dtype: DTypeLike) -> Float[Array, ...]:
    """A weight with one input axis as a product that takes no 8 bits wants it."""
    if not isinstance(w, Fp8Weight):
        return w
    return jnp.moveaxis((w.values.astype(jnp.float32) * w.scales[..., None]).astype(dtype), -1, input_axis)


def _scale(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), 1e-12) / FP8_MAX
