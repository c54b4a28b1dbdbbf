"""Rows rounded to e4m3, in plain jnp: what the kernels give, and what runs where there is none."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0


def scale_of(largest: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """What numbers are divided by before they are rounded, from the largest of them."""
    return jnp.maximum(largest, 1e-12) * (1 / E4M3_MAX)  # as XLA compiles a division by a constant


def quantize(x: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """Values in e4m3 and the scale of each row: x is about values * scales[:, None]."""
    wide = x.astype(jnp.float32)
    scales = scale_of(jnp.max(jnp.abs(wide), axis=-1))
    return (wide / scales[:, None]).astype(E4M3), scales


def quantize_normed(
    x: Float[Array, "T D"], gain: Float[Array, " D"], eps: float, offset: float
) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """The same of the RMS norm of x times (gain + offset)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return quantize(normed * (gain.astype(jnp.float32) + offset))


def quantize_gated(
    up: Float[Array, "T 2 F"], row_scales: Float[Array, " T"], scales: Float[Array, "2 F"], activation: Callable[[Array], Array]
) -> tuple[Float[Array, "T F"], Float[Array, " T"]]:
    """The same of activation(gate) * linear, in float32; gate and linear are up times the scales of its row and its column."""
    gate, linear = jnp.moveaxis(up.astype(jnp.float32) * row_scales[:, None, None] * scales, 1, 0)
    return quantize(activation(gate) * linear)
