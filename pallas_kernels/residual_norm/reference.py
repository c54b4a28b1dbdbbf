"""A product added to the residual stream and normalised, in plain jnp: what the kernel gives, and what runs where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.quantized_rows.reference import quantize


def add(
    residual: Float[Array, "T D"],
    parts: Float[Array, "S T D"],
    row_scales: Float[Array, " T"] | None,
    scales: Float[Array, " D"] | None,
) -> Float[Array, "T D"]:
    """The residual stream with the product added, which is rounded to its type first."""
    product = parts.astype(jnp.float32).sum(0)
    if row_scales is not None and scales is not None:
        product = product * row_scales[:, None] * scales
    return residual + product.astype(residual.dtype)


def add_and_normalize(
    residual: Float[Array, "T D"],
    parts: Float[Array, "S T D"],
    gain: Float[Array, " D"],
    row_scales: Float[Array, " T"] | None,
    scales: Float[Array, " D"] | None,
    eps: float,
    offset: float,
    rounds: bool,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """See api.add_and_normalize."""
    added = add(residual, parts, row_scales, scales)
    wide = added.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * (gain.astype(jnp.float32) + offset)
    return (added, *quantize(normed)) if rounds else (added, normed.astype(residual.dtype))
