"""Work lists of the GPU attention kernels, made on the device once a step from the lengths and shared by all layers.

Knows lengths, page tables and shapes only: no queries, keys or values. Every array has a static shape.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_sharing import share_splits

BLOCK = 64  # tokens of K and V that decode handles at once; splits and windows start at multiples of it
WORKERS = 132  # multiprocessors of an H100 or H200; each has two of decode's workers
MANY_ROUNDS = 16  # prefill items a multiprocessor from which locality counts for more than an even end
TILE = 128  # query tokens of one prefill work item
# What is left of a row behind so many whole splits, if it is below a quarter of one, is part of the last: as an item of its own it takes
# longer to fetch than to read. Behind fewer splits that would cost too much where rows share them.
MANY_SPLITS, JOINED = 8, 4
ALIGN = 8  # a tile starts at a multiple of it in the packed queries, as bulk copies want


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["items", "num_items", "arrivals", "shared_rows", "num_splits"],
    meta_fields=["max_splits", "window", "seats"],
)
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Every row's keys, cut into splits; each split is read once per kv head.

    Attributes:
        items: row, first token, last token + 1, split, splits of the row, first visible token, start, rows: an item of several
            rows, whose pages of this split are the same, has them in shared_rows[start:start + rows]. Whole splits come
            first and each row's last one follows by falling size: workers take them in this order and end at about the same time.
        num_items: how many items are in use.
        arrivals: zeros; a row's kv head counts its finished splits here, and its last one sets it back to 0. The last number
            counts the items that were taken.
        max_splits: the most splits a row can have.
        window: the sliding window the items were cut for.
        shared_rows: the rows of items of several rows.
        num_splits: of each row.
        seats: rows of an item at most; with 1 the two arrays before are None.
    """

    items: Int[Array, "M 8"]
    num_items: Int[Array, "1"]
    arrivals: Int[Array, "BK+1"]
    max_splits: int
    window: int | None
    shared_rows: Int[Array, " S*B"] | None = None
    num_splits: Int[Array, " B"] | None = None
    seats: int = 1


def default_split(num_rows: int, num_kv_heads: int) -> int:
    """Tokens a split: small batches need small ones to reach every multiprocessor, and merging what is split costs time.

    Depends on shapes alone, so that a result does not depend on the other requests of its step.
    """
    heads = num_rows * num_kv_heads
    return 128 if heads <= 4 else 256 if heads <= 16 else 512 if heads < 8 * WORKERS else 1024


def max_row_splits(num_rows: int, num_kv_heads: int) -> int:
    """The most splits of a row: a longer request gets longer splits instead of more, which bounds the partial results."""
    return max(16, -(-WORKERS // (num_rows * num_kv_heads)))


def plan_decode(
    kv_lens: Int[Array, "B"],
    num_rows: Int[Array, ""],
    *,
    num_kv_heads: int,
    max_len: int,
    window: int | None = None,
    split: int | None = None,
    fill: bool = True,
    page_tables: Int[Array, "B P"] | None = None,
    seats: int = 1,
) -> DecodePlan:
    """Cuts the rows below `num_rows` into work items.

    Args:
        kv_lens: tokens of each row, this step's included; at most `max_len`.
        num_rows: rows at and past it are not decoded.
        num_kv_heads: K of one device.
        max_len: page table width times page size: bounds the splits.
        window: the sliding window, None for full attention.
        split: tokens of an item, a multiple of 64, but for very long rows; None chooses `default_split`.
        fill: a row without tokens, used or not, gets an item that writes zeros. False where another kernel owns those rows.
        page_tables: pages of each row, for `seats`.
        seats: rows of an item at most that share a split's pages. With a window each row's splits begin elsewhere: none do.
    """
    num = kv_lens.shape[0]
    split = split or default_split(num, num_kv_heads)
    reach = max_len if window is None else min(max_len, window + BLOCK - 1)
    limit = max_row_splits(num, num_kv_heads)
    max_splits = min(-(-reach // split), limit)

    # 1. Each row's first visible token, its split size, and how many whole splits and what remainder it has.
    row = jnp.arange(num, dtype=jnp.int32)
    length = jnp.where(row < num_rows, kv_lens, 0).astype(jnp.int32)
    visible = jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0)
    origin = visible // BLOCK * BLOCK
    span = length - origin
    size = jnp.maximum(split, -(-span // (limit * BLOCK)) * BLOCK)
    joined = jnp.where(span >= MANY_SPLITS * size, size // JOINED, 0)
    whole = (span - joined) // size
    tail = span - whole * size
    has_tail = (tail > 0) | ((span == 0) & fill)
    count = whole + has_tail
    seats = seats if window is None and max_splits > 1 and page_tables is not None else 1
    listed, shared = whole, None  # whole splits that are this row's to read
    if seats > 1:
        assert page_tables is not None
        shared = share_splits(page_tables, max_len // page_tables.shape[1], size, count, max_splits=max_splits, seats=seats)
        leads = shared.leads & (jnp.arange(max_splits) < whole[:, None])
        listed = jnp.sum(leads, axis=1)

    # 2. Where each row's items stand in the list. All pairs are compared: one fused loop, where a sort or a scan is several.
    ends = jnp.sum(jnp.where(row[:, None] >= row[None], listed[None], 0), axis=1)
    larger = (tail[None] > tail[:, None]) | ((tail[None] == tail[:, None]) & (row[None] < row[:, None]))
    rank = jnp.sum(larger & has_tail[None], axis=1)
    num_whole = jnp.sum(listed)

    # 3. The row and split of every place in the list.
    place = jnp.arange(num * max_splits, dtype=jnp.int32)[:, None]
    is_whole = place[:, 0] < num_whole
    of_whole = jnp.sum(ends[None] <= place, axis=1)
    of_tail = jnp.sum(jnp.where(has_tail[None] & (rank[None] == place - num_whole), row[None], 0), axis=1)
    r = jnp.minimum(jnp.where(is_whole, of_whole, of_tail), num - 1)
    s = place[:, 0] - (ends - listed)[r]
    if shared is not None:
        led = jnp.sum(leads[:, None] & (jnp.arange(max_splits)[:, None] >= jnp.arange(max_splits)), axis=2)  # up to each split
        s = jnp.minimum(jnp.sum(led[r] <= s[:, None], axis=1), max_splits - 1)
    start, rows = (0 * r, 0 * r) if shared is None else (shared.start[r, s], jnp.where(is_whole, shared.size[r, s], 1))
    s = jnp.where(is_whole, s, whole[r])
    first = origin[r] + s * size[r]
    last = jnp.where(is_whole, first + size[r], length[r])
    items = jnp.stack([r, first, last, s, count[r], visible[r], start, rows], axis=1).astype(jnp.int32)
    num_items = num_whole + jnp.sum(has_tail)
    # Not a constant: the kernels write to it, so the compiler must not share it with other zeros.
    arrivals = jnp.pad(jnp.repeat(jnp.minimum(kv_lens, 0), num_kv_heads), (0, 1))
    num_items, arrivals = num_items.reshape(1).astype(jnp.int32), arrivals.astype(jnp.int32)
    if shared is None:
        return DecodePlan(items, num_items, arrivals, max_splits, window)
    return DecodePlan(items, num_items, arrivals, max_splits, window, shared.rows, count.astype(jnp.int32), seats)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["items", "num_items"], meta_fields=["window"])
@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """Query tiles of the rows with more than one query token, once for each head.

    Attributes:
        items: row, head, token, begin, end, position, length, 0. Tile row i is packed token `token + i` at `position + i`
            of a request of `length` tokens, and belongs to the row for i in [begin, end).
        num_items: how many items are in use.
        window: the sliding window the order was made for.
    """

    items: Int[Array, "M 8"]
    num_items: Int[Array, "1"]
    window: int | None


def plan_prefill(
    query_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    num_single_rows: Int[Array, ""],
    *,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    window: int | None = None,
) -> PrefillPlan:
    """Cuts the rows at and past `num_single_rows` into tiles of query tokens.

    Args:
        query_start: first packed token of each row, and the end of the last.
        kv_lens: tokens of each row, this step's included; 0 marks an unused row.
        num_single_rows: rows below it belong to decode.
        num_tokens: T, which bounds the tiles.
        num_heads: N of one device.
        num_kv_heads: K of one device.
        window: the sliding window, None for full attention.
    """
    num = kv_lens.shape[0]
    row = jnp.arange(num, dtype=jnp.int32)
    queries = jnp.where((row >= num_single_rows) & (kv_lens > 0), query_start[1:] - query_start[:-1], 0)
    shift = query_start[:-1] % ALIGN
    tiles = jnp.where(queries > 0, -(-(queries + shift) // TILE), 0)
    ends = jnp.sum(jnp.where(row[:, None] >= row[None], tiles[None], 0), axis=1)
    total = ends[-1]

    num_rows = max(min(num, num_tokens // 2), 1)  # a row has two tokens at least
    place = jnp.arange((num_tokens + num_rows * (ALIGN - 1)) // TILE + num_rows, dtype=jnp.int32)
    r = jnp.minimum(jnp.sum(ends[None] <= place[:, None], axis=1), num - 1)
    offset = (place - (ends - tiles)[r]) * TILE - shift[r]
    begin = jnp.maximum(-offset, 0)
    end = jnp.minimum(queries[r] - offset, TILE)
    position = kv_lens[r] - queries[r] + offset

    # The longest tiles first: what is left to do at the end is small, so the multiprocessors finish together.
    work = jnp.minimum(position + end, window + TILE) if window is not None else position + end
    work = jnp.where(place < total, work, -1)
    before = (work[None] > work[:, None]) | ((work[None] == work[:, None]) & (place[None] < place[:, None]))
    rank = jnp.sum(before, axis=1)
    order = jnp.sum(jnp.where(rank[None] == place[:, None], place[None], 0), axis=1)

    # Few tiles: all heads of one after the other. Many: one kv head after the other, so that its pages stay in the L2 cache.
    num_items = total * num_heads
    heads = jnp.where(num_items >= MANY_ROUNDS * WORKERS, num_heads // num_kv_heads, num_heads)
    sweep = jnp.maximum(total * heads, 1)
    item = jnp.arange(place.shape[0] * num_heads, dtype=jnp.int32)
    done, rest = item // sweep, item % sweep
    tile = order[rest // heads]
    r, offset = r[tile], offset[tile]
    fields = [r, done * heads + rest % heads, query_start[r] + offset, begin[tile], end[tile], position[tile], kv_lens[r], 0 * r]
    items = jnp.stack(fields, axis=1).astype(jnp.int32)
    return PrefillPlan(items, num_items.reshape(1).astype(jnp.int32), window)
