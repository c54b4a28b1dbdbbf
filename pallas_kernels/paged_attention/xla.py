"""Paged attention as blockwise XLA loops: the CPU's path, and the fallback wherever no kernel fits.

Work follows the lengths at hand, not the longest possible: every loop bound is a traced value. Rows with one token go
through the loop over key blocks together; rows with more (prefill chunks) one query block at a time. The online softmax is
that of Milakov and Gimelshein (2018), as in FlashAttention.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


class Blocks(NamedTuple):
    """How much a pass of a loop looks at.

    Attributes:
        queries: tokens of a prefill chunk computed together.
        keys: of their request.
        single_keys: of each row with one token.
    """

    queries: int = 64
    keys: int = 128
    single_keys: int = 128


CPU_BLOCKS = Blocks()
GPU_BLOCKS = Blocks(queries=256, keys=512)  # a pass takes a GPU some 40 us, however little it does
GPU_LATENT_BLOCKS = GPU_BLOCKS._replace(single_keys=512)  # keys and values of all heads would take too much memory
INT_MAX = 2**31 - 1
FLOOR = -1e30  # the running maximum before any key: finite, so that no inf - inf arises


class Softmax(NamedTuple):
    """Running state of an online softmax: maximum, denominator and weighted sum of values, in float32."""

    top: Float[Array, ...]
    total: Float[Array, ...]
    acc: Float[Array, "... H"]


def paged_attention(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages page_size rows H"],
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
    blocks: Blocks = CPU_BLOCKS,
) -> Float[Array, "T N V"]:
    """See api.paged_attention."""
    num_tokens, num_rows = q.shape[0], page_tables.shape[0]
    page_tables = _pad_to_blocks(page_tables, kv_pages.shape[1], blocks)
    attend = _Attend(kv_pages, sinks, alibi, scale, window, softcap, chunk, value_dim, blocks)

    # 1) Rows with one token, all at once.
    single = jnp.arange(num_rows) < num_single_rows
    token = jnp.where(single, query_start[:-1], num_tokens)
    if num_tokens == num_rows:  # a decode step has no other rows
        return attend.single_tokens(q, page_tables, jnp.where(single, kv_lens, 0))
    rows = attend.single_tokens(q.at[token].get(mode="fill", fill_value=0), page_tables, jnp.where(single, kv_lens, 0))
    out = jnp.zeros((num_tokens + blocks.queries, *rows.shape[1:]), q.dtype).at[token].set(rows, mode="drop")

    # 2) The other rows, a query block at a time. A block may run past its row's end: what it writes there belongs to the
    #    rows behind it, which come later and overwrite it.
    padded_q = jnp.pad(q, ((0, blocks.queries), (0, 0), (0, 0)))

    def row_blocks(row: Array, out: Array) -> Array:
        start, end, kv_len = query_start[row], query_start[row + 1], kv_lens[row]
        first_position = kv_len - (end - start)

        def query_block(i: Array, out: Array) -> Array:
            at = start + i * blocks.queries
            block = lax.dynamic_slice_in_dim(padded_q, at, blocks.queries)
            result = attend.chunk_of_row(block, page_tables[row], first_position + i * blocks.queries, kv_len)
            updated: Array = lax.dynamic_update_slice_in_dim(out, result, at, axis=0)
            return updated

        written: Array = lax.fori_loop(0, _cdiv(end - start, blocks.queries), query_block, out)
        return written

    result: Array = lax.fori_loop(num_single_rows, jnp.sum(query_start[:-1] < query_start[-1]), row_blocks, out)
    return result[:num_tokens]


class _Attend(NamedTuple):
    """What both kinds of rows share."""

    kv_pages: Array
    sinks: Array | None
    alibi: Array | None
    scale: float
    window: int | None
    softcap: float | None
    chunk: int | None
    value_dim: int | None
    blocks: Blocks

    @property
    def num_kv_heads(self) -> int:
        rows = int(self.kv_pages.shape[2])
        return rows // 2 if self.value_dim is None else rows

    def single_tokens(self, q: Float[Array, "B N H"], tables: Array, kv_lens: Int[Array, " B"]) -> Float[Array, "B N V"]:
        """One query token a row, the last of its kv_lens tokens."""
        batch, num_heads, head_dim = q.shape
        grouped = q.reshape(batch, self.num_kv_heads, -1, head_dim)
        size = self.blocks.single_keys
        first: jax.typing.ArrayLike = 0
        if self.window is not None:
            first = _min_where(kv_lens - self.window, kv_lens > 0) // size
        elif self.chunk is not None:
            first = _min_where((kv_lens - 1) // self.chunk * self.chunk, kv_lens > 0) // size
        position = (kv_lens - 1)[:, None]

        def key_block(j: Array, state: Softmax) -> Softmax:
            key_position = j * size + jnp.arange(size)
            seen = self._seen(key_position, position, kv_lens[:, None])
            k, v = self._load(tables, j, size, q.dtype, seen)
            logits = jnp.einsum("BKGH,BSKH->BKGS", grouped, k, precision=_precision(k), preferred_element_type=jnp.float32)
            bias = self._bias(key_position, position[:, None, None], query_axis=False)
            return self._update(state, logits, bias, seen[:, None, None], v, "BKGS,BSKV->BKGV")

        last = _cdiv(jnp.max(kv_lens), size)
        state = lax.fori_loop(first, last, key_block, _empty((*grouped.shape[:-1], self.value_dim or head_dim)))
        return self._finish(state).reshape(batch, num_heads, -1).astype(q.dtype)

    def chunk_of_row(self, q: Float[Array, "Q N H"], table: Array, position: Array, kv_len: Array) -> Float[Array, "Q N V"]:
        """A block of one row's query tokens, the first at `position`."""
        num_queries, num_heads, head_dim = q.shape
        grouped = q.reshape(num_queries, self.num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        positions = (position + jnp.arange(num_queries))[:, None]
        size = self.blocks.keys
        first: jax.typing.ArrayLike = 0
        if self.window is not None:
            first = jnp.maximum(position - self.window + 1, 0) // size
        elif self.chunk is not None:
            first = position // self.chunk * self.chunk // size

        def key_block(j: Array, state: Softmax) -> Softmax:
            key_position = j * size + jnp.arange(size)
            seen = self._seen(key_position, positions, kv_len)
            k, v = self._load(table[None], j, size, q.dtype, jnp.any(seen, axis=0)[None])
            logits = jnp.einsum("KGQH,SKH->KGQS", grouped, k[0], precision=_precision(k), preferred_element_type=jnp.float32)
            bias = self._bias(key_position, positions, query_axis=True)
            return self._update(state, logits, bias, seen, v[0], "KGQS,SKV->KGQV")

        last = _cdiv(jnp.minimum(position + num_queries, kv_len), size)
        state = lax.fori_loop(first, last, key_block, _empty((*grouped.shape[:-1], self.value_dim or head_dim)))
        return self._finish(state, query_axis=True).transpose(2, 0, 1, 3).reshape(num_queries, num_heads, -1).astype(q.dtype)

    def _load(
        self, tables: Int[Array, "B max_pages"], j: Array, size: int, dtype: DTypeLike, in_use: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
        """The j-th block of `size` keys and values of each row.

        A key nobody sees may be an unwritten slot, which may hold NaN: its weight of 0 would not remove that from the values.
        """
        pages = size // self.kv_pages.shape[1]
        ids = lax.dynamic_slice_in_dim(tables, j * pages, pages, axis=1)
        rows = self.kv_pages[ids].reshape(tables.shape[0], size, *self.kv_pages.shape[2:]).astype(dtype)
        is_used = in_use[..., None, None]
        if self.value_dim is not None:
            rows = jnp.where(is_used, rows, 0)
            return rows, rows[..., : self.value_dim]
        kv = rows.reshape(tables.shape[0], size, self.num_kv_heads, 2, -1)
        return kv[..., 0, :], jnp.where(is_used, kv[..., 1, :], 0)

    def _seen(self, key_position: Array, position: Array, kv_len: Array) -> Array:
        seen = (key_position <= position) & (key_position < kv_len)
        if self.chunk is not None:
            seen &= key_position >= position // self.chunk * self.chunk
        return seen if self.window is None else seen & (key_position > position - self.window)

    def _bias(self, key_position: Int[Array, " S"], position: Array, query_axis: bool) -> Array | None:
        """ALiBi. Slopes in bfloat16 are Falcon's: products with the key's position rounded to it, then scaled as scores are."""
        if self.alibi is None:
            return None
        slopes = self.alibi.reshape(self.num_kv_heads, -1, *((1, 1) if query_axis else (1,)))
        if slopes.dtype == jnp.bfloat16:
            product = slopes.astype(jnp.float32) * key_position.astype(jnp.bfloat16).astype(jnp.float32)
            return lax.reduce_precision(product, exponent_bits=8, mantissa_bits=7) * self.scale
        return slopes * (key_position - position)

    def _update(self, state: Softmax, logits: Array, bias: Array | None, seen: Array, v: Array, contract: str) -> Softmax:
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if bias is not None:
            logits += bias
        logits = jnp.where(seen, logits, -jnp.inf)
        top = jnp.maximum(state.top, jnp.max(logits, axis=-1))
        decay = jnp.exp(state.top - top)
        weights = jnp.exp(logits - top[..., None])
        added = jnp.einsum(contract, weights.astype(v.dtype), v, precision=_precision(v), preferred_element_type=jnp.float32)
        return Softmax(top, state.total * decay + jnp.sum(weights, axis=-1), state.acc * decay[..., None] + added)

    def _finish(self, state: Softmax, query_axis: bool = False) -> Array:
        total = state.total
        if self.sinks is not None:
            sinks = self.sinks.reshape(self.num_kv_heads, -1).astype(jnp.float32)
            total = total + jnp.exp((sinks[..., None] if query_axis else sinks) - state.top)
        return state.acc / jnp.where(total == 0, 1, total)[..., None]


def _precision(x: Array) -> lax.Precision | None:
    """float32 is asked for to get float32: GPUs and TPUs would otherwise round it to fewer bits for a product."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _empty(shape: tuple[int, ...]) -> Softmax:
    return Softmax(jnp.full(shape[:-1], FLOOR), jnp.zeros(shape[:-1]), jnp.zeros(shape))


def _min_where(x: Array, where: Array) -> Array:
    """The least x, at least 0; 0 where nothing is chosen."""
    return jnp.maximum(jnp.min(jnp.where(where, x, INT_MAX), initial=INT_MAX), 0)


def _pad_to_blocks(page_tables: Int[Array, "B max_pages"], page_size: int, blocks: Blocks) -> Int[Array, "B padded"]:
    """Widens the tables so that every key block is whole."""
    size = max(blocks.keys, blocks.single_keys)
    if blocks.keys % page_size or blocks.single_keys % page_size:
        raise NotImplementedError(
            f"page size {page_size} does not divide the key blocks of {blocks.keys} and {blocks.single_keys}"
        )
    pages = size // page_size
    return jnp.pad(page_tables, ((0, 0), (0, -page_tables.shape[1] % pages)))


def _cdiv(a: jax.typing.ArrayLike, b: int) -> Array:
    return (jnp.asarray(a) + b - 1) // b
