"""A product added to the residual stream, and the norm of that: the signature, and the choice of a back end. Knows arrays only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.paged_attention import Implementation
from jaxserve.pallas_kernels.residual_norm import reference

log = logging.getLogger(__name__)

Results = tuple[Array, Array] | tuple[Array, Array, Array]


def add_and_normalize(
    residual: Float[Array, "T D"],
    parts: Float[Array, "S T D"],
    gain: Float[Array, " D"],
    row_scales: Float[Array, " T"] | None = None,
    scales: Float[Array, " D"] | None = None,
    *,
    eps: float,
    offset: float,
    rounds: bool,
    implementation: Implementation,
) -> Results:
    """The residual stream with a product added, and the RMS norm of that times (gain + offset), computed in float32.

    Args:
        parts: whose sum, in float32, is the product.
        row_scales, scales: what the product's rows and columns are yet to be multiplied by.
        eps: added to the mean of squares.
        rounds: to 8 bits, a row's largest value to 448; else the norm has residual's type.

    Returns:
        The new residual stream, its norm [T, D], and, if rounded, a scale for each row.
    """
    options = {"eps": eps, "offset": offset, "rounds": rounds}
    if implementation == "mosaic_gpu" and residual.dtype == jnp.bfloat16:
        try:
            return _kernel(**options)(residual, parts, gain, row_scales, scales)
        except NotImplementedError as reason:
            _say_once(f"sums and norms run without a kernel: {reason}")
    return reference.add_and_normalize(residual, parts, gain, row_scales, scales, eps, offset, rounds)


@functools.cache
def _kernel(eps: float, offset: float, rounds: bool) -> Callable[..., Results]:
    """Jitted, so that layers share one lowering."""
    from jaxserve.pallas_kernels.residual_norm import mosaic_gpu

    return jax.jit(functools.partial(mosaic_gpu.add_and_normalize, eps=eps, offset=offset, rounds=rounds))


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)
