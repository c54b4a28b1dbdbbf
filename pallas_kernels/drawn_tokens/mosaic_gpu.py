"""Draws on an NVIDIA GPU: thread blocks take some tokens of a row each, and make noise only where the row's token is drawn."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxtyping import Array, Bool, Float, Int

from jaxserve.pallas_kernels.drawn_tokens.noise import gumbel
from jaxserve.pallas_kernels.kept_tokens import order_of
from jaxserve.pallas_kernels.kept_tokens.mosaic_gpu import LAYOUT, LINE, THREADS, line, serves

plgpu: Any = _mosaic_gpu  # not typed

__all__ = ["draw", "serves"]  # what thresholds are found for is drawn from: there counts are float32, here places

LINES = 8  # of a thread block
OUT_LAYOUT = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)


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
    rows, vocab_size = logits.shape
    chunks = -(-vocab_size // (LINES * LINE))
    words = jnp.concatenate([keys, least[:, None], is_drawn[:, None].astype(jnp.int32)], axis=1)
    values, places = plgpu.kernel(
        _largest_of_chunk,
        out_type=[jax.ShapeDtypeStruct((rows, chunks, THREADS), jnp.float32)] * 2,
        grid=(rows, chunks),
        grid_names=("row", "chunk"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(logits, scale, words)
    values, places = values[:, :, 0], places[:, :, 0]
    best = jnp.argmax(values, axis=-1, keepdims=True)
    place, value = (jnp.take_along_axis(x, best, axis=-1)[:, 0] for x in (places, values))
    return place.astype(jnp.int32), value


def _largest_of_chunk(logits: Any, scale: Any, words: Any, values: Any, places: Any) -> None:
    """The kernel's body."""
    row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
    key0, key1, least, is_drawn = (words[row, i] for i in range(4))
    last = logits.shape[1] - LINE
    starts = [chunk * (LINES * LINE) + u * LINE for u in range(LINES)]
    begins = [jnp.minimum(start, last) for start in starts]
    lines = [plgpu.load(logits.at[row, pl.ds(at, LINE)], layout=LAYOUT) for at in begins]
    place = plgpu.broadcasted_iota(jnp.int32, (LINE,), 0, layout=LAYOUT)

    def write(value: Any) -> None:
        """Gives the largest value(numbers, place of the first) and the first place that has it. All threads store the same: none can alone."""
        best, where = line(jnp.float32(-jnp.inf)), line(jnp.int32(0))
        for x, start, at in zip(lines, starts, begins, strict=True):
            v = jnp.where(place >= start - at, value(jnp.where(jnp.isnan(x), jnp.inf, x), at), -jnp.inf)
            is_better = v > best
            best, where = jnp.where(is_better, v, best), jnp.where(is_better, place + at, where)
        top = jnp.max(best)
        first = -jnp.max(jnp.where(best == top, -where.astype(jnp.float32), -jnp.inf))
        for out, found in ((values, top), (places, first)):
            out.at[row, chunk][...] = plgpu.layout_cast(jnp.broadcast_to(found, (THREADS,)), OUT_LAYOUT)

    @pl.when(is_drawn == 0)
    def _() -> None:
        write(lambda x, at: x)

    @pl.when(is_drawn == 1)
    def _() -> None:
        factor = scale[row]

        def drawn(x: jax.Array, at: jax.Array) -> jax.Array:
            x = x * factor
            noise = gumbel(line(key0), line(key1), place + at)
            return jnp.where(order_of(x) >= least, x + noise, -jnp.inf)

        write(drawn)
