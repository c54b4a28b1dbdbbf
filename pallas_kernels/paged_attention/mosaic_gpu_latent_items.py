"""Latent attention's work items, as its kernel reads them out of decode's and prefill's work lists."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK


@dataclasses.dataclass(frozen=True)
class Item:
    """What a thread block does with one tile of query rows.

    Attributes:
        row: of the page tables.
        lo, hi: first token and last token + 1.
        split, count: which of how many splits of the row.
        seat: where the tile's rows begin in q, in multiples of `rows`.
        tile: which of a token's tiles.
        position: last token that the first rows see; each later token of the tile sees one more.
        first, size: rows of the tile that are stored.
    """

    row: Any
    lo: Any
    hi: Any
    split: Any
    count: Any
    seat: Any
    tile: Any
    position: Any
    first: Any
    size: Any

    @property
    def blocks(self) -> jax.Array:
        return lax.div(self.hi - self.lo + (BLOCK - 1), BLOCK)


def decode_item(items: Any, i: jax.Array, *, num_tiles: int, rows: int) -> Item:
    """The i-th of a DecodePlan, whose items are of all of a token's tiles."""
    j, tile = lax.div(i, num_tiles), lax.rem(i, num_tiles)
    row, lo, hi, split, count = (items[j, f] for f in range(5))
    return Item(row, lo, hi, split, count, row * num_tiles + tile, tile, hi - 1, jnp.int32(0), jnp.int32(rows))


def prefill_item(items: Any, i: jax.Array, *, num_tiles: int, rows: int, per_tile: int) -> Item:
    """The i-th of a PrefillPlan, whose "head" says which of the tiles of per_tile tokens."""
    row, head, token, begin, end, position = (items[i, f] for f in range(6))
    part, tile = lax.div(head, num_tiles), lax.rem(head, num_tiles)
    above = part * per_tile
    begin, end = (jnp.clip(x - above, 0, per_tile) for x in (begin, end))
    zero = jnp.int32(0)
    return Item(
        row=row, lo=zero, hi=jnp.where(end > begin, position + above + end, 0), split=zero, count=jnp.int32(1),
        seat=(token + above) * num_tiles + tile, tile=tile, position=position + above, first=begin * rows,
        size=(end - begin) * rows,
    )  # fmt: skip
