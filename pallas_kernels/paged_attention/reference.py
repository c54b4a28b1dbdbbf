"""Paged attention in plain jnp: the oracle of the other back ends. Gathers every key of every token, so small shapes only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
) -> Float[Array, "T N V"]:
    """See api.paged_attention; computed in float32."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows, rows_per_head = page_tables.shape[0], 2 if value_dim is None else 1
    num_kv_heads = kv_pages.shape[2] // rows_per_head
    token = jnp.arange(num_tokens)
    row = jnp.clip(jnp.searchsorted(query_start, token, side="right") - 1, 0, num_rows - 1)
    position = kv_lens[row] - (query_start[row + 1] - query_start[row]) + token - query_start[row]

    kv = kv_pages[page_tables].reshape(num_rows, -1, num_kv_heads, rows_per_head, head_dim).astype(jnp.float32)
    key_position = jnp.arange(kv.shape[1])
    seen = key_position <= position[:, None]
    if window is not None:
        seen &= key_position > position[:, None] - window
    if chunk is not None:
        seen &= key_position // chunk == position[:, None] // chunk
    seen &= key_position < kv_lens[row][:, None]

    grouped = q.reshape(num_tokens, num_kv_heads, -1, head_dim).astype(jnp.float32)
    kv = jnp.where((key_position < kv_lens[:, None])[:, :, None, None, None], kv, 0)  # unwritten slots may hold NaN
    logits = jnp.einsum("TKGH,TSKH->TKGS", grouped, kv[row, :, :, 0], precision="highest") * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if alibi is not None:
        slopes = alibi.reshape(1, num_kv_heads, -1, 1)
        if alibi.dtype == jnp.bfloat16:
            logits += (slopes * key_position.astype(jnp.bfloat16)).astype(jnp.float32) * scale  # eager: each step is rounded
        else:
            logits += slopes * (key_position - position[:, None])[:, None, None]
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.reshape(1, num_kv_heads, -1, 1), (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink.astype(jnp.float32)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : kv.shape[1]]
    out = jnp.einsum("TKGS,TSKH->TKGH", weights, kv[row, :, :, -1, :value_dim], precision="highest")
    return out.reshape(num_tokens, num_heads, -1).astype(q.dtype)


def rotate_qkv(
    qkv: Float[Array, "... T K G+2 H"],
    cos: Float[Array, "T H/2"],
    sin: Float[Array, "T H/2"],
    row_scales: Float[Array, " T"] | None,
    scales: Float[Array, "K G+2 H"] | None,
    gains: tuple[Float[Array, " H"], Float[Array, " H"]] | None = None,
    *,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Queries, keys and values, scaled and the first two normalised and rotated in float32; see api.rotate_and_write."""
    summed = qkv.sum(0).astype(jnp.bfloat16) if qkv.ndim == 5 else qkv
    wide = summed.astype(jnp.float32)
    if row_scales is not None and scales is not None:
        wide = wide * row_scales[:, None, None, None] * scales
    turning = wide[:, :, :-1]
    if gains is not None:
        is_query = jnp.arange(turning.shape[2])[:, None] < turning.shape[2] - 1
        turning = turning * jax.lax.rsqrt(jnp.mean(turning * turning, axis=-1, keepdims=True) + eps)
        turning = turning * (jnp.where(is_query, gains[0], gains[1]).astype(jnp.float32) + offset)
    first, second = jnp.split(turning, 2, axis=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(summed.dtype)
    q = turned[:, :, :-1]
    return q.reshape(q.shape[0], -1, q.shape[-1]), turned[:, :, -1], wide[:, :, -1].astype(summed.dtype)
