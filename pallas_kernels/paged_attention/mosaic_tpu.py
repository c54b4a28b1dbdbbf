"""Ragged paged attention for TPUs: one Pallas kernel, for rows of one token and, in blocks of tokens, for prefill chunks.

Knows no device: the block sizes (mosaic_tpu_layout.py) fit every chip. Compiled and interpreted, never run on a TPU.
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

from jaxserve.pallas_kernels.paged_attention.mosaic_tpu_layout import LANES, PAGE_MULTIPLE, Blocks, choose_blocks, lanes_of

VMEM_LIMIT = 32 * 2**20  # what the compiler may take, temporaries included: half of the smallest chip's
FLOOR = -1e30  # the running maximum before any key, and a masked logit: finite, so that no inf - inf arises


class _Items(NamedTuple):
    """The work list, a (row, block of query tokens) each, in the order of tokens; one entry more than can be in use."""

    rows: Int[Array, " items"]
    blocks: Int[Array, " items"]
    used: Int[Array, ""]


class _Options(NamedTuple):
    """What is static about a call.

    Attributes:
        value: where in a row of the pages the value is; None for the first value_dim lanes being key and value.
    """

    blocks: Blocks
    page_size: int
    key: slice
    value: slice
    scale: float
    window: int | None
    softcap: float | None
    chunk: int | None
    rounded_alibi: bool


def paged_attention(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages K page_size lanes"],
    page_tables: Int[Array, "B max_pages"],
    query_start: Int[Array, " B+1"],
    kv_lens: Int[Array, " B"],
    num_single_rows: Int[Array, ""],
    sinks: Float[Array, " N"] | None = None,
    alibi: Float[Array, " N"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    value_dim: int | None = None,
    interpret: Any = False,
) -> Float[Array, "T N V"]:
    """See api.paged_attention, with pages as mosaic_tpu_layout.pages_shape has them.

    Args:
        interpret: pltpu.InterpretParams, to run anywhere.

    Raises:
        ValueError: pages are no whole tiles, or none fits VMEM.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_rows, num_kv_heads, page_size = page_tables.shape[0], kv_pages.shape[1], kv_pages.shape[2]
    group = num_heads // num_kv_heads
    if page_size % PAGE_MULTIPLE:
        raise ValueError(
            f"pages of {page_size} tokens are no whole tiles: block_size must be a multiple of {PAGE_MULTIPLE} on a TPU"
        )

    # Lanes of the value. Where key and value are not whole tiles, both matrix products run over the whole row: queries are 0
    # where the value is, and of the results only the value's lanes are kept.
    width, whole = kv_pages.shape[3], slice(0, kv_pages.shape[3])
    key, value = (slice(0, head_dim), slice(head_dim, width)) if head_dim % LANES == 0 else (whole, whole)
    kept = slice(head_dim, 2 * head_dim) if key == whole else slice(0, head_dim)
    if value_dim is not None:
        key, value, kept = whole, slice(0, lanes_of(value_dim)), slice(0, value_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, key.stop - head_dim)))

    def attend(q: Array, items: _Items, blocks: Blocks) -> Array:
        rounded = alibi is not None and alibi.dtype == jnp.bfloat16
        options = _Options(blocks, page_size, key, value, scale, window, softcap, chunk, rounded)
        by_head = tuple(x for x in (sinks, alibi) if x is not None)
        kernel = functools.partial(_kernel, options=options, has_sinks=sinks is not None, has_alibi=alibi is not None)
        return _call(kernel, q, kv_pages, page_tables, (query_start, kv_lens), by_head, items, options, interpret)

    sizes = (num_kv_heads, group, width, page_size, kv_pages.dtype.itemsize)
    # Token b is that of row b for every row with one token, as these come first.
    rows = jnp.arange(num_rows + 1, dtype=jnp.int32)
    row_items = _Items(rows.at[-1].set(0), rows.at[-1].set(0), num_single_rows.astype(jnp.int32))
    decoded = attend(q[:num_rows], row_items, choose_blocks(*sizes, decode=True))[..., kept]
    if num_tokens == num_rows:
        return decoded
    blocks = choose_blocks(*sizes, decode=False)
    chunks = attend(q, _chunk_items(query_start, num_single_rows, num_tokens, blocks.query), blocks)[..., kept]
    is_single = (jnp.arange(num_rows) < num_single_rows)[:, None, None]
    merged: Array = lax.dynamic_update_slice_in_dim(chunks, jnp.where(is_single, decoded, chunks[:num_rows]), 0, axis=0)
    return merged


def _chunk_items(query_start: Int[Array, " B+1"], first_row: Int[Array, ""], num_tokens: int, block: int) -> _Items:
    """Every block of tokens that each row from first_row on has a part in."""
    start, end = query_start[:-1], query_start[1:]
    num_rows, num_blocks = start.shape[0], -(-num_tokens // block)
    in_use = (jnp.arange(num_rows) >= first_row) & (end > start)
    counts = jnp.where(in_use, (end + block - 1) // block - start // block, 0)
    ends = jnp.cumsum(counts)
    item = jnp.arange(num_blocks + num_rows + 1, dtype=jnp.int32)
    rows = jnp.minimum(jnp.searchsorted(ends, item, side="right", method="compare_all"), num_rows - 1).astype(jnp.int32)
    blocks = start[rows] // block + item - (ends - counts)[rows]
    return _Items(rows, jnp.clip(blocks, 0, num_blocks - 1).astype(jnp.int32), ends[-1].astype(jnp.int32))


def _call(
    kernel: Any,
    q: Float[Array, "T N key"],
    kv_pages: Float[Array, "pages K page_size lanes"],
    page_tables: Int[Array, "B max_pages"],
    lengths: tuple[Int[Array, " B+1"], Int[Array, " B"]],
    by_head: tuple[Float[Array, " N"], ...],
    items: _Items,
    options: _Options,
    interpret: Any,
) -> Float[Array, "T N value"]:
    """Lays q out as blocks, [blocks, K, G * tokens, lanes], and the results back."""
    num_tokens, num_heads, key_width = q.shape
    num_kv_heads, tokens = kv_pages.shape[1], options.blocks.query
    group, out_width = num_heads // num_kv_heads, options.value.stop - options.value.start
    q = jnp.pad(q, ((0, -num_tokens % tokens), (0, 0), (0, 0)))
    q = q.reshape(-1, tokens, num_kv_heads, group, key_width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(-1, num_kv_heads, group * tokens, key_width)
    rows = group * tokens
    by_row = [jnp.repeat(x.astype(jnp.float32).reshape(num_kv_heads, group), tokens, axis=1)[..., None] for x in by_head]

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, num_kv_heads, rows, width), lambda i, rows, blocks, *_: (blocks[i], 0, 0, 0))

    def table(ahead: int) -> pl.BlockSpec:
        shape = (1, 1, page_tables.shape[1])
        return pl.BlockSpec(shape, lambda i, rows, *_: (rows[i + ahead], 0, 0), memory_space=pltpu.SMEM)

    out: Array = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((*q.shape[:-1], out_width), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(jnp.maximum(items.used, 1),),  # without work, one item that nobody looks at
            in_specs=[
                table(0),
                table(1),
                block(key_width),
                pl.BlockSpec(memory_space=pltpu.HBM),
                *(pl.BlockSpec((num_kv_heads, rows, 1), lambda *_: (0, 0, 0)) for _ in by_row),
            ],
            out_specs=block(out_width),
            scratch_shapes=[
                pltpu.VMEM((2, num_kv_heads, options.blocks.key, kv_pages.shape[3]), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((num_kv_heads, rows, out_width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="paged_attention_decode" if tokens == 1 else "paged_attention_chunks",
    )(items.rows, items.blocks, items.used[None], *lengths, page_tables[:, None], page_tables[:, None], q, kv_pages, *by_row)
    out = out.reshape(-1, num_kv_heads, group, tokens, out_width).transpose(0, 3, 1, 2, 4)
    by_token: Array = out.reshape(-1, num_heads, out_width)[:num_tokens]
    return by_token


class _Span(NamedTuple):
    """What an item is about: its query tokens, what to add to a token for its position, and the keys that they see."""

    first_token: Array
    last_token: Array
    to_position: Array
    first_key: Array
    last_key: Array


def _kernel(
    rows: Any,
    item_blocks: Any,
    count: Any,
    query_start: Any,
    kv_lens: Any,
    table: Any,
    next_table: Any,
    q: Any,
    kv_pages: Any,
    *refs: Any,
    options: _Options,
    has_sinks: bool,
    has_alibi: bool,
) -> None:
    """One item: copies its keys block by block, the next block (perhaps the next item's first) while one is computed."""
    by_row, (out, buffer, arrived, slot_of, top, total, acc) = refs[:-7], refs[-7:]
    sinks, alibi = by_row[0] if has_sinks else None, by_row[-1] if has_alibi else None
    (num_queries, num_keys), page_size = options.blocks, options.page_size
    num_kv_heads, num_rows = q.shape[1], q.shape[2]
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
        return _Span(first, last, to_position, first_key, jnp.maximum(last + to_position, 0))

    def for_pages(table: Any, span: _Span, j: Array, slot: Array, do: str) -> None:
        """Starts, or waits for, the copies of a block's pages, those alone that hold a key which is seen."""
        first = jnp.maximum(lax.div(span.first_key, page_size), j * (num_keys // page_size))
        last = jnp.minimum(_cdiv(span.last_key, page_size), (j + 1) * (num_keys // page_size))

        def page(n: Array, _: None) -> None:
            at = pl.multiple_of((n - j * (num_keys // page_size)) * page_size, page_size)
            target = buffer.at[slot, :, pl.ds(at, page_size), :]
            getattr(pltpu.make_async_copy(kv_pages.at[table[0, 0, n]], target, arrived.at[slot]), do)()

        lax.fori_loop(first, last, page, None)

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
    token = item_blocks[item] * num_queries + (lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0) & (num_queries - 1))
    position = token + here.to_position

    def key_block(j: Array, slot: Array) -> Array:
        @pl.when(j + 1 < last_block)
        def _() -> None:
            for_pages(table, here, j + 1, 1 - slot, "start")

        @pl.when((j + 1 == last_block) & (item + 1 < count[0]))
        def _() -> None:
            coming = span(item + 1)
            for_pages(next_table, coming, lax.div(coming.first_key, num_keys), 1 - slot, "start")

        for_pages(table, here, j, slot, "wait")

        # What was not copied, or belongs to nobody, may be NaN, which a weight of 0 would not remove.
        @pl.when((j * num_keys < here.first_key) | ((j + 1) * num_keys > here.last_key))
        def _() -> None:
            key = j * num_keys + lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)

            def clear(head: Array, _: None) -> None:
                held = buffer[slot, head].astype(jnp.float32)
                kept = jnp.where((key >= here.first_key) & (key < here.last_key), held, 0)
                buffer[slot, head] = kept.astype(buffer.dtype)

            lax.fori_loop(0, num_kv_heads, clear, None)

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
        return 1 - slot

    slot_of[0] = lax.fori_loop(first_block, last_block, key_block, slot_of[0])

    def finish(k: Array, _: None) -> None:
        result = (acc[k] / total[k][:, :1]).astype(out.dtype)
        if num_queries > 1:  # the block's other tokens are those of the items beside this one
            mine = (token >= here.first_token) & (token < here.last_token)
            result = jnp.where(mine, result, out[0, k])
        out[0, k] = result

    lax.fori_loop(0, num_kv_heads, finish, None)


def _bias(slopes: Array, key: Array, position: Array, options: _Options) -> Array:
    """ALiBi, see api.paged_attention."""
    if options.rounded_alibi:
        product = slopes * key.astype(jnp.bfloat16).astype(jnp.float32)
        return product.astype(jnp.bfloat16).astype(jnp.float32) * options.scale
    return slopes * (key - position).astype(jnp.float32)


def _cdiv(a: Array, b: int) -> Array:
    return lax.div(a + (b - 1), jnp.int32(b))
