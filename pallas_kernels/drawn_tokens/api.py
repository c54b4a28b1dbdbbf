"""The kernel that draws, where there is one. XLA's way is the sampler's, which makes the noise before it branches. Knows no requests."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from jaxserve.pallas_kernels.paged_attention import Implementation

Draw = Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]
"""See mosaic_gpu.draw."""


def find_kernel(implementation: Implementation, vocab_size: int) -> Draw | None:
    """What draws from rows of so many logits, if a kernel does."""
    if implementation == "mosaic_gpu":
        from jaxserve.pallas_kernels.drawn_tokens import mosaic_gpu

        if mosaic_gpu.serves(vocab_size):
            return mosaic_gpu.draw
    return None
