"""Ragged paged attention for TPUs: one Pallas kernel, for rows of one token and, in blocks of tokens, for prefill chunks.

Owns the work lists and how arrays are laid out for the kernel's body (mosaic_tpu_kernel.py). Knows no device: the block sizes
(mosaic_tpu_layout.py) fit every chip. Compiled and interpreted, never run on a TPU.
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

from jaxserve.pallas_kernels.paged_attention import mosaic_tpu_kernel
from jaxserve.pallas_kernels.paged_attention.mosaic_tpu_kernel import Options
from jaxserve.pallas_kernels.paged_attention.mosaic_tpu_layout import LANES, PAGE_MULTIPLE, Blocks, choose_blocks, lanes_of

VMEM_LIMIT = 32 * 2**20  # what the compiler may take, temporaries included: half of the smallest chip's


class _Items(NamedTuple):
    """The work list, a (row, block of query tokens) each, in the order of tokens; one entry more than can be in use."""

    rows: Int[Array, " items"]
    blocks: Int[Array, " items"]
    used: Int[Array, ""]


def paged_attention(
    q: Float[Array, "T N H"],
    new: Float[Array, "T K width"] | None,
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
) -> tuple[Float[Array, "T N V"], Float[Array, "pages K page_size lanes"]]:
    """See api.paged_attention, with pages as mosaic_tpu_layout.pages_shape has them.

    Args:
        new: a row of the pages for each token, with numbers that their type can hold; None where the pages have them.
        interpret: pltpu.InterpretParams, to run anywhere.

    Returns:
        (what is attended to, the pages with the new rows); pages are updated in place when they are donated. Slots past a
        request's last key, in its last tile, are set to 0.

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

    new = None if new is None else jnp.pad(new, ((0, 0), (0, 0), (0, width - new.shape[2])))
    sizes = (num_kv_heads, group, width, page_size, kv_pages.dtype.itemsize)
    is_decode = num_tokens == num_rows

    def attend(num_tokens: int, kv_pages: Array, items: _Items, blocks: Blocks) -> tuple[Array, Array]:
        rounded = alibi is not None and alibi.dtype == jnp.bfloat16
        options = Options(blocks, page_size, new is not None, key, value, scale, window, softcap, chunk, rounded)
        by_head = tuple(x for x in (sinks, alibi) if x is not None)
        has = {"has_sinks": sinks is not None, "has_alibi": alibi is not None}
        kernel = functools.partial(mosaic_tpu_kernel.attend, options=options, **has)
        tables, lengths = page_tables[:, None], (query_start, kv_lens)
        by_token = [q[:num_tokens]] if new is None else [q[:num_tokens], new[:num_tokens]]
        out, kv_pages = _call(kernel, by_token, kv_pages, tables, lengths, by_head, items, options, interpret)
        return out[..., kept], kv_pages

    # Chunks first: rows with one token may share pages that a chunk of this very step fills.
    if not is_decode:
        blocks = choose_blocks(*sizes, decode=False)
        items = _chunk_items(query_start, num_single_rows, num_tokens, blocks.query)
        chunks, kv_pages = attend(num_tokens, kv_pages, items, blocks)
    # Token b is that of row b for every row with one token, as these come first.
    rows = jnp.arange(num_rows + 1, dtype=jnp.int32).at[-1].set(0)
    items = _Items(rows, rows, num_single_rows.astype(jnp.int32))
    decoded, kv_pages = attend(num_rows, kv_pages, items, choose_blocks(*sizes, decode=True))
    if is_decode:
        return decoded, kv_pages
    is_single = (jnp.arange(num_rows) < num_single_rows)[:, None, None]
    merged = lax.dynamic_update_slice_in_dim(chunks, jnp.where(is_single, decoded, chunks[:num_rows]), 0, axis=0)
    return merged, kv_pages


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
    by_token: list[Float[Array, "T heads width"]],
    kv_pages: Float[Array, "pages K page_size lanes"],
    page_tables: Int[Array, "B 1 max_pages"],
    lengths: tuple[Int[Array, " B+1"], Int[Array, " B"]],
    by_head: tuple[Float[Array, " N"], ...],
    items: _Items,
    options: Options,
    interpret: Any,
) -> tuple[Float[Array, "T N value"], Float[Array, "pages K page_size lanes"]]:
    """Lays q and the new rows (by_token) out as blocks, [blocks, K, G * tokens, width], and the results back."""
    num_tokens, num_heads, _ = by_token[0].shape
    _, num_kv_heads, _, lanes = kv_pages.shape
    tokens, group, out_width = options.blocks.query, num_heads // num_kv_heads, options.value.stop - options.value.start
    rows = group * tokens

    def in_blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, -num_tokens % tokens), (0, 0), (0, 0)))
        x = x.reshape(-1, tokens, num_kv_heads, x.shape[1] // num_kv_heads, x.shape[2]).transpose(0, 2, 3, 1, 4)
        return x.reshape(-1, num_kv_heads, x.shape[2] * tokens, x.shape[4])

    def block(rows: int, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, num_kv_heads, rows, width), lambda i, rows, blocks, *_: (blocks[i], 0, 0, 0))

    def table(ahead: int) -> pl.BlockSpec:
        shape = (1, 1, page_tables.shape[2])
        return pl.BlockSpec(shape, lambda i, rows, *_: (rows[i + ahead], 0, 0), memory_space=pltpu.SMEM)

    by_block = [in_blocks(x) for x in by_token]
    by_row = [jnp.repeat(x.astype(jnp.float32).reshape(num_kv_heads, group), tokens, axis=1)[..., None] for x in by_head]
    out, kv_pages = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((*by_block[0].shape[:-1], out_width), by_block[0].dtype),
            jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(jnp.maximum(items.used, 1),),
            in_specs=[
                table(0),
                table(1),
                *(block(*x.shape[2:]) for x in by_block),
                pl.BlockSpec(memory_space=pltpu.HBM),
                *(pl.BlockSpec((num_kv_heads, rows, 1), lambda *_: (0, 0, 0)) for _ in by_row),
            ],
            out_specs=(block(rows, out_width), pl.BlockSpec(memory_space=pltpu.HBM)),
            scratch_shapes=mosaic_tpu_kernel.scratch_shapes(num_kv_heads, rows, lanes, kv_pages.dtype, options),
        ),
        input_output_aliases={7 + len(by_block): 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="paged_attention_decode" if tokens == 1 else "paged_attention_chunks",
    )(items.rows, items.blocks, items.used[None], *lengths, page_tables, page_tables, *by_block, kv_pages, *by_row)
    out = out.reshape(-1, num_kv_heads, group, tokens, out_width).transpose(0, 3, 1, 2, 4)
    return out.reshape(-1, num_heads, out_width)[:num_tokens], kv_pages
