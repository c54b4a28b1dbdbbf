"""Rows rounded to e4m3: the signatures that every back end has, and the choice of one. Knows arrays only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.paged_attention import Implementation
from jaxserve.pallas_kernels.quantized_rows import reference

log = logging.getLogger(__name__)

Rounded = tuple[Float[Array, "T D"], Float[Array, " T"]]
"""Values in e4m3 and a scale for each row, whose largest value becomes 448."""


def quantize(x: Float[Array, "T D"], implementation: Implementation) -> Rounded:
    """x rounded: values * scales[:, None] is about x."""
    return _run("quantize", implementation, x)


def quantize_normed(
    x: Float[Array, "T D"], gain: Float[Array, " D"], *, eps: float, offset: float, implementation: Implementation
) -> Rounded:
    """The RMS norm of x times (gain + offset), computed and rounded in float32.

    Args:
        eps: added to the mean of squares.
    """
    return _run("quantize_normed", implementation, x, gain, eps=eps, offset=offset)


def quantize_gated(
    up: Float[Array, "T 2 F"],
    row_scales: Float[Array, " T"],
    scales: Float[Array, "2 F"],
    activation: Callable[[Array], Array],
    implementation: Implementation,
) -> Rounded:
    """activation(gate) * linear, computed and rounded in float32.

    Args:
        up: gate and linear, before they are multiplied by their scales.
        row_scales: of each row.
        scales: of each column.
    """
    return _run("quantize_gated", implementation, up, row_scales, scales, activation=activation)


def _run(name: str, implementation: Implementation, *arrays: Array, **options: Any) -> Rounded:
    if implementation == "mosaic_gpu" and arrays[0].dtype == jnp.bfloat16:
        try:
            return _kernel(name, tuple(options.items()))(*arrays)
        except NotImplementedError as reason:
            _say_once(f"rounding to 8 bits runs without a kernel: {reason}")
    result: Rounded = getattr(reference, name)(*arrays, **options)
    return result


@functools.cache
def _kernel(name: str, options: tuple[tuple[str, Any], ...]) -> Callable[..., Rounded]:
    """Jitted, so that layers share one lowering."""
    from jaxserve.pallas_kernels.quantized_rows import mosaic_gpu

    return jax.jit(functools.partial(getattr(mosaic_gpu, name), **dict(options)))


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)
