"""Draws in a kernel, where there is one. XLA's are the sampler's, which makes the noise before it branches. Knows no requests."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from jaxserve.pallas_kernels.paged_attention import Implementation


def draws_by_kernel(implementation: Implementation, vocab_size: int) -> bool:
    """Whether `draw` serves rows of so many logits."""
    if implementation != "mosaic_gpu":
        return False
    from jaxserve.pallas_kernels.drawn_tokens import mosaic_gpu

    return mosaic_gpu.serves(vocab_size)


def draw(
    logits: Float[Array, "S V"],
    scale: Float[Array, " S"],
    least: Int[Array, " S"],
    is_drawn: Bool[Array, " S"],
    keys: Int[Array, "S 2"],
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Where each row's largest number is, the first of equals, and the number; NaN counts as infinite.

    Args:
        logits: float32.
        scale: one over the temperature.
        least: tokens of a smaller order_of(logits * scale) are not drawn.
        is_drawn: rows compared as logits * scale + gumbel noise; the others as they are.
        keys: the words of each row's key for the noise.
    """
    from jaxserve.pallas_kernels.drawn_tokens import mosaic_gpu

    return mosaic_gpu.draw(logits, scale, least, is_drawn, keys)
