"""Page write for TPUs: reads a tile of a page, puts the tokens in that belong there, writes it back.

XLA's scatter would turn 8-bit pages over and back, that is, copy the pool. Compiled and interpreted, never run on a TPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int


class _Items(NamedTuple):
    """Runs of tokens that go to consecutive slots of one tile.

    Attributes:
        tiles: of the pool, counted through all pages.
        tokens, offsets, lengths: of the run's first token, where it goes in the tile, and how many there are.
    """

    tiles: Int[Array, " T"]
    tokens: Int[Array, " T"]
    offsets: Int[Array, " T"]
    lengths: Int[Array, " T"]
    used: Int[Array, ""]


def write_rows(
    pages: Float[Array, "pages K page_size lanes"],
    rows: Float[Array, "T K width"],
    write_slots: Int[Array, " T"],
    *,
    interpret: Any = False,
) -> Float[Array, "pages K page_size lanes"]:
    """Puts each token's rows into its page, as api.write_rows does; in place when pages is donated.

    Args:
        rows: with numbers that the pages' type can hold.
        interpret: pltpu.InterpretParams, to run anywhere.
    """
    num_pages, heads, page_size, lanes = pages.shape
    tile = 32 // pages.dtype.itemsize  # rows of a tile as the hardware lays them out
    tiles = page_size // tile
    items = _items(write_slots, tile, num_pages * tiles)
    # The tokens of a tile lie in two aligned blocks of as many; the padding in front makes up for what lies before the first.
    padding = ((tile, -rows.shape[0] % tile + tile), (0, 0), (0, lanes - rows.shape[-1]))
    rows = jnp.pad(rows, padding).swapaxes(0, 1)

    def source(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (heads, tile, lanes), lambda i, _, tokens, offsets, *__: (0, _base(tokens, offsets, i, tile) + ahead, 0)
        )

    def target(i: Array, ids: Any, *_: Any) -> tuple[Any, ...]:
        return lax.div(ids[i], tiles), 0, lax.rem(ids[i], tiles), 0

    in_page = pl.BlockSpec((1, heads, tile, lanes), target)
    written: Array = pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(jnp.maximum(items.used, 1),),  # without tokens, a tile is written as it was
            in_specs=[source(0), source(1), in_page],
            out_specs=in_page,
        ),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_pages",
    )(*items[:4], rows, rows, pages)
    return written


def _items(write_slots: Int[Array, " T"], tile: int, num_tiles: int) -> _Items:
    """The runs, in order; past the end they have no tokens."""
    num_tokens = write_slots.shape[0]
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    valid = write_slots < num_tiles * tile
    follows = write_slots == jnp.roll(write_slots, 1) + 1
    starts = valid & ((index == 0) | ~follows | (write_slots % tile == 0))
    bounds = jnp.where(starts | ~valid, index, num_tokens)
    next_bound = jnp.append(lax.cummin(bounds, reverse=True)[1:], num_tokens)
    count = jnp.sum(starts, dtype=jnp.int32)
    tokens = jnp.nonzero(starts, size=num_tokens, fill_value=0)[0].astype(jnp.int32)
    slots = jnp.where(index < count, write_slots[tokens], 0)
    lengths = jnp.where(index < count, next_bound[tokens] - tokens, 0)
    return _Items(slots // tile, tokens, slots % tile, lengths, count)


def _base(tokens: Any, offsets: Any, i: Array, tile: int) -> Array:
    """Which block of tokens, the padding counted, the one that goes to the tile's first row is in."""
    return lax.div(tokens[i] - offsets[i] + tile, tile)


def _kernel(
    tiles: Any, tokens: Any, offsets: Any, lengths: Any, left: Any, right: Any, before: Any, after: Any, *, tile: int
) -> None:
    i = pl.program_id(0)
    token, offset, length = tokens[i], offsets[i], lengths[i]
    first = (_base(tokens, offsets, i, tile) - 1) * tile  # token of the blocks' first row
    source = first + lax.broadcasted_iota(jnp.int32, (2 * tile, 1), 0)
    is_taken = (source >= token) & (source < token + length)
    # Row r of the tile takes token `token + r - offset`: a matrix product with one 1 a row shifts, and is exact.
    row = lax.broadcasted_iota(jnp.int32, (tile, 2 * tile), 0)
    moved = row + (token - offset) == first + lax.broadcasted_iota(jnp.int32, (tile, 2 * tile), 1)
    target = lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    is_new = (target >= offset) & (target < offset + length)
    precision = "highest" if left.dtype == jnp.float32 else None

    def head(k: Array, _: None) -> None:
        rows = jnp.concatenate([left[k], right[k]], axis=0).astype(jnp.float32)
        rows = jnp.where(is_taken, rows, 0).astype(left.dtype)  # what is not taken may be NaN
        new = jnp.dot(moved.astype(left.dtype), rows, precision=precision, preferred_element_type=jnp.float32)
        after[0, k] = jnp.where(is_new, new, before[0, k].astype(jnp.float32)).astype(after.dtype)

    lax.fori_loop(0, left.shape[0], head, None)
