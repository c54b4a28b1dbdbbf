"""Matmul of few rows: which ones the kernel takes. Knows arrays only, neither layers nor models."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

MOST_ROWS = 128
"""Beyond, the rows are more to read than the weights, and XLA's products near what the tensor cores can do."""


def serves(x: Float[Array, "R K"], w: Float[Array, ...], *, inputs_last: bool) -> bool:
    """Whether skinny_matmul takes these; shapes and types decide."""
    rows, depth = x.shape
    cols = w.shape[0 if inputs_last else 1]
    is_wide, is_narrow = w.dtype == jnp.bfloat16, w.dtype == jnp.float8_e4m3fn and inputs_last
    fits = depth % (128 // w.dtype.itemsize) == 0 and cols % 128 == 0  # pieces of 128 bytes, tiles of 128 features
    return rows <= MOST_ROWS and x.dtype == jnp.bfloat16 and (is_wide or is_narrow) and fits


def skinny_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, ...],
    scales: Float[Array, " M"] | None = None,
    *,
    inputs_last: bool,
    out_dtype: DTypeLike,
) -> Float[Array, "R M"]:
    """x times w on a Hopper GPU, summed in float32, each output feature times its scale.

    Args:
        w: [K, M], or [M, K] with inputs_last, which float8_e4m3fn asks for; x is not rounded to 8 bits for it.
        scales: float32.
    """
    from jaxserve.pallas_kernels.skinny_matmul import mosaic_gpu

    out: Array = mosaic_gpu.skinny_matmul(x, w, scales, inputs_last=inputs_last, out_dtype=out_dtype)
    return out
