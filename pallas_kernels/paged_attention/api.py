"""Paged attention: the signature that every back end has, the layout of a page, and the choice of a back end.

Layout: one array a layer, [pages, page_size, 2 * K, H]; key and value of kv head k are rows 2k and 2k + 1. A TPU's kernel has a
layout of its own (mosaic_tpu_layout.py).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention import mosaic_tpu_layout, reference, xla

log = logging.getLogger(__name__)

E4M3_MAX = 448.0
KERNEL_WRITE_TOKENS = 64  # fewer go as fast through XLA's scatter, which fuses what makes them

Implementation = Literal["xla", "mosaic_gpu", "mosaic_tpu", "reference"]


def choose_implementation(platform: str, device_kind: str) -> Implementation:
    """The back end for a device, as jax names it: Mosaic on TPUs, Mosaic GPU on Hopper, else the blockwise XLA loops."""
    if platform == "tpu":
        return "mosaic_tpu"
    is_hopper = any(name in device_kind for name in ("H100", "H200", "H20", "H800", "GH200"))
    return "mosaic_gpu" if platform == "gpu" and is_hopper else "xla"


def pages_shape(
    num_pages: int,
    page_size: int,
    num_heads: int,
    head_dim: int,
    implementation: Implementation = "xla",
    *,
    is_latent: bool = False,
) -> tuple[int, int, int, int]:
    """Shape of one layer's pool.

    Args:
        num_heads, head_dim: of keys and values.
        is_latent: each row is key and value in one.
    """
    rows = 1 if is_latent else 2
    if implementation == "mosaic_tpu":
        return mosaic_tpu_layout.pages_shape(num_pages, page_size, num_heads, rows * head_dim)
    return (num_pages, page_size, rows * num_heads, head_dim)


def head_axis(implementation: Implementation) -> int:
    """Which axis of a pool is cut where heads spread over devices."""
    return mosaic_tpu_layout.HEAD_AXIS if implementation == "mosaic_tpu" else 2


def write_kv(
    kv_pages: Float[Array, "pages page_size rows H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"] | None,
    write_slots: Int[Array, " T"],
    implementation: Implementation = "xla",
) -> Float[Array, "pages page_size rows H"]:
    """Puts each token's key and value at page * page_size + offset = write_slots[t]; slots past the pool are dropped.

    In place when kv_pages is donated. In 8-bit pages, what e4m3 cannot hold becomes its largest number. On a TPU, attention
    writes.
    """
    if v is None:
        return _scatter(kv_pages, k, write_slots)
    # A choice by index, not a concatenation: XLA's GPU kernel for that takes twice the time.
    kv = jnp.where(jnp.arange(2)[:, None] == 0, k[:, :, None], v[:, :, None]).reshape(k.shape[0], *kv_pages.shape[2:])
    if implementation == "mosaic_gpu" and kv.shape[0] >= KERNEL_WRITE_TOKENS:
        from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_write

        try:
            written: Array = mosaic_gpu_write.write_kv(kv_pages, _as_stored(kv, kv_pages), write_slots)
            return written
        except NotImplementedError as reason:
            _say_once(f"the page write runs without a kernel, as XLA's scatter: {reason}")
    return _scatter(kv_pages, kv, write_slots)


def rotate_and_write(
    qkv: Float[Array, "... T K G+2 H"],
    cos: Float[Array, "T H/2"],
    sin: Float[Array, "T H/2"],
    kv_pages: Float[Array, "pages page_size rows H"],
    write_slots: Int[Array, " T"],
    row_scales: Float[Array, " T"] | None = None,
    scales: Float[Array, "K G+2 H"] | None = None,
    gains: tuple[Float[Array, " H"], Float[Array, " H"]] | None = None,
    *,
    eps: float = 0.0,
    offset: float = 0.0,
    implementation: Implementation,
) -> tuple[Float[Array, "T N H"], Float[Array, "pages page_size rows H"]]:
    """Normalises queries and keys, if asked to, and rotates them, in float32; writes keys and values to their pages as write_kv does.

    Args:
        qkv: of each kv head its G query heads, its key and its value; or parts [S, T, K, G + 2, H] in float32, whose sum is that
            in bfloat16.
        cos, sin: of each token's angles; the pairs are (i, i + H / 2).
        row_scales, scales: what qkv is yet to be multiplied by, where it is a product of 8-bit numbers.
        gains: each query head becomes its RMS norm times (gain + offset), with the first of these, each key with the second.
        eps: added to the mean of squares.

    Returns:
        The queries and the pool.
    """
    if implementation == "mosaic_gpu":
        from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_rope

        try:
            arrays = (qkv, cos, sin, kv_pages, write_slots, row_scales, scales, gains)
            return mosaic_gpu_rope.rotate_and_write(*arrays, eps=eps, offset=offset)
        except NotImplementedError as reason:
            _say_once(f"rope and page write run as kernels of their own: {reason}")
    q, k, v = reference.rotate_qkv(qkv, cos, sin, row_scales, scales, gains, eps=eps, offset=offset)
    return q, write_kv(kv_pages, k, v, write_slots, implementation)


def _scatter(
    pages: Float[Array, "pages page_size rows H"], rows: Float[Array, "T rows H"], write_slots: Int[Array, " T"]
) -> Float[Array, "pages page_size rows H"]:
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat.at[write_slots].set(_as_stored(rows, pages), mode="drop").reshape(pages.shape)


def _as_stored(rows: Float[Array, "T rows H"], pages: Float[Array, "pages ..."]) -> Float[Array, "T rows H"]:
    """Rows in the pages' type."""
    return _within(rows, pages).astype(pages.dtype)


def _within(rows: Float[Array, "T rows H"], pages: Float[Array, "pages ..."]) -> Float[Array, "T rows H"]:
    """Rows within what 8-bit pages can hold: the conversion alone would give NaN."""
    return jnp.clip(rows, -E4M3_MAX, E4M3_MAX) if pages.dtype.itemsize == 1 else rows


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    kv_pages: Float[Array, "pages ..."],
    write_slots: Int[Array, " T"],
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
    implementation: Implementation,
    shares_pages: bool = False,
) -> tuple[Float[Array, "T N V"], Float[Array, "pages ..."]]:
    """Writes the step's keys and values to their pages; causal attention of its tokens, each over its own request's pages.

    Row b's query tokens are query_start[b]:query_start[b + 1], the last of its kv_lens[b] tokens. The token at position p sees
    positions max(0, p - window + 1) to p. Rows may share pages that one of them fills in this call, if that one has several
    tokens and the others come after it or have one.

    Args:
        q: queries.
        k, v: keys and values of the same tokens; None where the pool has them already.
        kv_pages: one layer's pool, laid out as pages_shape has it; updated in place when donated.
        write_slots: where each token's key and value go: page * page_size + offset, as page_tables has it; past the pool for
            a token not in use.
        page_tables: pages of each row, in order; entries past kv_lens are never read.
        query_start: start of each row's tokens in q; its last entry is where the last row in use ends.
        kv_lens: keys of each row, those of its query tokens included; 0 for an unused row.
        num_single_rows: rows with exactly one token come first; this is how many there are. With T = B there are no others. Elsewhere
            than on a TPU the last of them may be unused, so that the others begin at another token.
        sinks: a logit for each head that takes part in the softmax without a value (gpt-oss).
        alibi: a slope for each head: slope * (key position - query position) is added to the logits. In bfloat16, as Falcon
            has it: slope * key position, rounded to bfloat16, is added to q . k before the scale.
        scale: factor on q . k.
        window: keys that a token sees, itself included; None for all.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        chunk: a token sees only keys of its own chunk of this many positions.
        value_dim: each row of the pool is a key of its own, and its first value_dim numbers are the value (latent attention);
            v is None.
        implementation: the back end; a GPU's that cannot do these shapes leaves them to the XLA loops, and says so once.
            "reference" is the only one with a gradient, and needs every token of q to be in use.
        shares_pages: a GPU's kernel reads pages that rows with one token have in common once for all of them; the result is the
            same to the bit.

    Returns:
        ([T, N, value_dim or H], in q's type, the pool). Rows of tokens not in use are unspecified, and may be NaN.
    """
    rows = (page_tables, query_start, kv_lens, num_single_rows, sinks)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "chunk": chunk, "value_dim": value_dim}
    if implementation == "mosaic_tpu":
        from jaxserve.pallas_kernels.paged_attention import mosaic_tpu

        new = k if k is None or v is None else jnp.concatenate([k, v], axis=-1)
        new = None if new is None else _within(new, kv_pages)
        attended, kv_pages = mosaic_tpu.paged_attention(q, new, kv_pages, *rows, alibi, **options)
        return attended, kv_pages
    if k is not None:
        kv_pages = write_kv(kv_pages, k, v, write_slots, implementation)
    if implementation == "mosaic_gpu":
        from jaxserve.pallas_kernels.paged_attention import mosaic_gpu, mosaic_gpu_latent

        try:
            decode_only = q.shape[0] == page_tables.shape[0]
            if alibi is not None or chunk is not None:
                raise NotImplementedError("no kernel has ALiBi or chunks")
            out: Array
            if value_dim is not None:
                if window is not None or softcap is not None or sinks is not None:
                    raise NotImplementedError("the kernel for latent rows has no window, softcap or sinks")
                out = mosaic_gpu_latent.paged_attention(
                    q, kv_pages, *rows[:4], scale=scale, value_dim=value_dim, decode_only=decode_only
                )
                return out, kv_pages
            out = mosaic_gpu.paged_attention(
                q,
                kv_pages,
                *rows,
                scale=scale,
                window=window,
                softcap=softcap,
                decode_only=decode_only,
                shares_pages=shares_pages,
            )
            return out, kv_pages
        except NotImplementedError as reason:
            _say_once(f"attention runs without a kernel, as XLA loops: {reason}")
    if implementation == "reference":
        return reference.paged_attention(q, kv_pages, *rows, alibi, **options), kv_pages
    if implementation == "mosaic_gpu":
        options["blocks"] = xla.GPU_BLOCKS if value_dim is None else xla.GPU_LATENT_BLOCKS
    return xla.paged_attention(q, kv_pages, *rows, alibi, **options), kv_pages


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)
