"""The body of the TPU's attention kernel: one item of its work list. Writes new keys and values to their pages on the way.

Knows no arrays' shapes beyond its blocks, and not how the work list is made (mosaic_tpu.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxserve.pallas_kernels.paged_attention.mosaic_tpu_layout import LANES, Blocks

FLOOR = -1e30  # the running maximum before any key, and a masked logit: finite, so that no inf - inf arises


class Options(NamedTuple):
    """What is static about a call.

    Attributes:
        writes: whether there are new rows; else the pool has them already.
        key, value: where in a row of the pages they are.
    """

    blocks: Blocks
    page_size: int
    writes: bool
    key: slice
    value: slice
    scale: float
    window: int | None
    softcap: float | None
    chunk: int | None
    rounded_alibi: bool


class _Span(NamedTuple):
    """What an item is about: its query tokens, what to add to a token for its position, and the keys that they see.

    Attributes:
        first_page: the first key of the page that first_key is in; from there on the request's keys are copied.
        first_new: the first key that is not in the pool yet, last_key if all are; the new ones are the item's own tokens'.
    """

    first_token: Array
    last_token: Array
    to_position: Array
    first_key: Array
    first_page: Array
    first_new: Array
    last_key: Array


def scratch_shapes(num_kv_heads: int, rows: int, lanes: int, dtype: Any, options: Options) -> list[Any]:
    """What the body keeps: two blocks of pages, semaphores of the copies, the slot that is next, and the softmax' state."""
    out_width = options.value.stop - options.value.start
    return [
        pltpu.VMEM((2, num_kv_heads, options.blocks.key, lanes), dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((1,)),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
        pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
        pltpu.VMEM((num_kv_heads, rows, out_width), jnp.float32),
    ]


def attend(
    rows: Any,
    item_blocks: Any,
    count: Any,
    query_start: Any,
    kv_lens: Any,
    table: Any,
    next_table: Any,
    q: Any,
    *refs: Any,
    options: Options,
    has_sinks: bool,
    has_alibi: bool,
) -> None:
    """One item: copies its keys block by block, the next block (perhaps the next item's first) while one is computed.

    New keys are put among the copied ones, and from there go to the pool. Items run in order, and all that one has written is
    in the pool before the next one's copies of it start.
    """
    inputs, (out, kv_pages, buffer, arrived, written, slot_of, top, total, acc) = refs[:-9], refs[-9:]
    new = inputs[0] if options.writes else None
    by_row = inputs[1 + options.writes :]  # the pool comes before, and is the same memory as the output
    sinks, alibi = by_row[0] if has_sinks else None, by_row[-1] if has_alibi else None
    (num_queries, num_keys), page_size = options.blocks, options.page_size
    num_kv_heads, num_rows = q.shape[1], q.shape[2]
    tile = 32 // buffer.dtype.itemsize  # rows of a tile as the hardware lays them out: the least that a copy moves
    item = pl.program_id(0)

    def span(item: Array) -> _Span:
        row, block = rows[item], item_blocks[item]
        start, end = query_start[row], query_start[row + 1]
        first, last = jnp.maximum(start, block * num_queries), jnp.minimum(end, (block + 1) * num_queries)
        to_position = kv_lens[row] - end
        position, first_key = first + to_position, jnp.int32(0)
        if options.window is not None:
            first_key = jnp.maximum(position - options.window + 1, 0)
        if options.chunk is not None:
            first_key = jnp.maximum(first_key, lax.div(position, options.chunk) * options.chunk)
        first_page = lax.div(first_key, page_size) * page_size
        last_key = jnp.where(item < count[0], last + to_position, 0)  # without work there is one item, which has no keys
        return _Span(first, last, to_position, first_key, first_page, position if options.writes else last_key, last_key)

    def for_pages(table: Any, span: _Span, j: Array, slot: Array, do: str) -> None:
        """Starts, or waits for, the copies of a block's pages, those alone that hold a key which is seen."""
        first = jnp.maximum(lax.div(span.first_page, page_size), j * (num_keys // page_size))
        last = jnp.minimum(_cdiv(span.last_key, page_size), (j + 1) * (num_keys // page_size))

        def page(n: Array, _: None) -> None:
            at = pl.multiple_of((n - j * (num_keys // page_size)) * page_size, page_size)
            target = buffer.at[slot, :, pl.ds(at, page_size), :]
            getattr(pltpu.make_async_copy(kv_pages.at[table[0, 0, n]], target, arrived.at[slot]), do)()

        lax.fori_loop(first, last, page, None)

    def for_new_tiles(span: _Span, j: Array, slot: Array, do: str) -> None:
        """Starts, or waits for, the copies to the pool of a block's tiles with new keys."""
        if new is None:
            return
        first = lax.div(jnp.maximum(span.first_new, j * num_keys), tile)
        last = _cdiv(jnp.minimum(span.last_key, (j + 1) * num_keys), tile)

        def copy(n: Array, _: None) -> None:
            source = buffer.at[slot, :, pl.ds(pl.multiple_of(n * tile - j * num_keys, tile), tile), :]
            page, at = table[0, 0, lax.div(n, page_size // tile)], lax.rem(n, page_size // tile) * tile
            target = kv_pages.at[page, :, pl.ds(pl.multiple_of(at, tile), tile), :]
            getattr(pltpu.make_async_copy(source, target, written.at[0]), do)()

        lax.fori_loop(first, last, copy, None)

    here = span(item)
    first_block, last_block = lax.div(here.first_key, num_keys), _cdiv(here.last_key, num_keys)

    @pl.when(item == 0)
    def _() -> None:
        slot_of[0] = 0
        for_pages(table, here, first_block, jnp.int32(0), "start")

    if sinks is None:
        top[...] = jnp.full(top.shape, FLOOR, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
    else:  # a sink is a key without a value
        top[...] = jnp.broadcast_to(sinks[...], top.shape)
        total[...] = jnp.ones(total.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    first_query = item_blocks[item] * num_queries
    token = first_query + (lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0) & (num_queries - 1))
    position = token + here.to_position

    def placed(head: Array, key: Array) -> Array | float:
        """The new rows of a head, each where its key is."""
        if new is None:
            return 0.0
        if num_queries == 1:
            one: Array = new[0, head].astype(jnp.float32)
            return one
        query = first_query + lax.broadcasted_iota(jnp.int32, (num_queries, 1), 0)
        is_mine = (query >= here.first_token) & (query < here.last_token)  # what is not may be NaN
        mine = jnp.where(is_mine, new[0, head].astype(jnp.float32), 0).astype(new.dtype)
        # A matrix product with at most one 1 a row moves rows, and is exact.
        moves = key == first_query + here.to_position + lax.broadcasted_iota(jnp.int32, (num_keys, num_queries), 1)
        precision = "highest" if new.dtype == jnp.float32 else None
        return jnp.dot(moves.astype(new.dtype), mine, precision=precision, preferred_element_type=jnp.float32)

    def complete(j: Array, slot: Array) -> None:
        """Puts new keys in; clears what was not copied, or belongs to nobody: NaN, which a weight of 0 would not remove."""
        key = j * num_keys + lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)
        is_old = (key >= here.first_page) & (key < here.first_new)
        is_new = (key >= here.first_new) & (key < here.last_key)

        def head(k: Array, _: None) -> None:
            held = jnp.where(is_old, buffer[slot, k].astype(jnp.float32), 0)
            buffer[slot, k] = jnp.where(is_new, placed(k, key), held).astype(buffer.dtype)

        lax.fori_loop(0, num_kv_heads, head, None)

    def key_block(j: Array, slot: Array) -> Array:
        @pl.when(j + 1 < last_block)
        def _() -> None:
            for_pages(table, here, j + 1, 1 - slot, "start")

        coming, has_next = span(item + 1), (j + 1 == last_block) & (item + 1 < count[0])
        coming_block = lax.div(coming.first_key, num_keys)
        # Whether the next item's first keys are others than this one writes: a row with one token has pages of its own, but a
        # row may share pages that the row before it has just filled.
        is_earlier = (rows[item + 1] == rows[item]) & (coming_block < lax.div(here.first_new, num_keys))
        is_apart = (num_queries == 1 or not options.writes) | is_earlier

        @pl.when(has_next & is_apart)
        def _() -> None:
            for_pages(next_table, coming, coming_block, 1 - slot, "start")

        for_pages(table, here, j, slot, "wait")
        pl.when((j * num_keys < here.first_page) | ((j + 1) * num_keys > here.first_new))(lambda: complete(j, slot))
        for_new_tiles(here, j, slot, "start")

        key = j * num_keys + lax.broadcasted_iota(jnp.int32, (1, num_keys), 1)
        seen = (key <= position) & (key >= here.first_key)
        if options.window is not None:
            seen &= key > position - options.window
        if options.chunk is not None:
            seen &= key >= lax.div(position, options.chunk) * options.chunk

        def head(k: Array, _: None) -> None:
            held = buffer[slot, k].astype(q.dtype)
            logits = lax.dot_general(q[0, k], held[:, options.key], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            logits *= options.scale
            if options.softcap is not None:
                logits = options.softcap * jnp.tanh(logits / options.softcap)
            if alibi is not None:
                logits += _bias(alibi[k], key, position, options)
            logits = jnp.where(seen, logits, FLOOR)
            before = top[k][:, :1]
            now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            decay, weights = jnp.exp(before - now), jnp.exp(logits - now)
            top[k] = jnp.broadcast_to(now, top.shape[1:])
            total[k] = total[k] * decay + jnp.sum(weights, axis=1, keepdims=True)
            added = jnp.dot(weights.astype(q.dtype), held[:, options.value], preferred_element_type=jnp.float32)
            acc[k] = acc[k] * decay + added

        lax.fori_loop(0, num_kv_heads, head, None)
        for_new_tiles(here, j, slot, "wait")

        @pl.when(has_next & ~is_apart)
        def _() -> None:
            for_pages(next_table, coming, coming_block, 1 - slot, "start")

        return 1 - slot

    slot_of[0] = lax.fori_loop(first_block, last_block, key_block, slot_of[0])

    def finish(k: Array, _: None) -> None:
        result = (acc[k] / total[k][:, :1]).astype(out.dtype)
        if num_queries > 1:  # the block's other tokens are those of the items beside this one
            mine = (token >= here.first_token) & (token < here.last_token)
            result = jnp.where(mine, result, out[0, k])
        out[0, k] = result

    lax.fori_loop(0, num_kv_heads, finish, None)


def _bias(slopes: Array, key: Array, position: Array, options: Options) -> Array:
    """ALiBi, see api.paged_attention."""
    if options.rounded_alibi:
        product = slopes * key.astype(jnp.bfloat16).astype(jnp.float32)
        return product.astype(jnp.bfloat16).astype(jnp.float32) * options.scale
    return slopes * (key - position).astype(jnp.float32)


def _cdiv(a: Array, b: int) -> Array:
    return lax.div(a + (b - 1), jnp.int32(b))
