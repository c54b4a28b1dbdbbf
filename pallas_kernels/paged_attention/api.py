"""Paged attention: the signature that every back end has, the layout of a page, and the choice of a back end.

Layout: one array a layer, [pages, page_size, 2 * K, H]; key and value of kv head k are rows 2k and 2k + 1.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention import xla

log = logging.getLogger(__name__)

E4M3_MAX = 448.0
KERNEL_WRITE_TOKENS = 64  # fewer go as fast through XLA's scatter, which fuses what makes them

Implementation = Literal["xla", "mosaic_gpu"]


def choose_implementation(platform: str, device_kind: str) -> Implementation:
    """The back end for a device, as jax names it: Mosaic GPU on Hopper, else the blockwise XLA loops."""
    is_hopper = any(name in device_kind for name in ("H100", "H200", "H20", "H800", "GH200"))
    return "mosaic_gpu" if platform == "gpu" and is_hopper else "xla"


def kv_pages_shape(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of one layer's pool."""
    return (num_pages, page_size, 2 * num_kv_heads, head_dim)


def write_kv(
    kv_pages: Float[Array, "pages page_size 2*K H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    write_slots: Int[Array, " T"],
    implementation: Implementation = "xla",
) -> Float[Array, "pages page_size 2*K H"]:
    """Puts each token's key and value at page * page_size + offset = write_slots[t]; slots past the pool are dropped.

    In place when kv_pages is donated. In 8-bit pages, what e4m3 cannot hold becomes its largest number.
    """
    pages, page_size, heads, head_dim = kv_pages.shape
    kv = jnp.stack([k, v], axis=2).reshape(k.shape[0], heads, head_dim)
    if kv_pages.dtype.itemsize == 1:
        kv = jnp.clip(kv, -E4M3_MAX, E4M3_MAX)  # the conversion alone would give NaN
    kv = kv.astype(kv_pages.dtype)
    if implementation == "mosaic_gpu" and kv.shape[0] >= KERNEL_WRITE_TOKENS:
        from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_write

        try:
            written: Array = mosaic_gpu_write.write_kv(kv_pages, kv, write_slots)
            return written
        except NotImplementedError as reason:
            _say_once(f"the page write runs without a kernel, as XLA's scatter: {reason}")
    flat = kv_pages.reshape(pages * page_size, heads, head_dim)
    return flat.at[write_slots].set(kv, mode="drop").reshape(kv_pages.shape)


def paged_attention(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages page_size 2*K H"],
    page_tables: Int[Array, "B max_pages"],
    query_start: Int[Array, " B+1"],
    kv_lens: Int[Array, " B"],
    num_single_rows: Int[Array, ""],
    sinks: Float[Array, " N"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation,
) -> Float[Array, "T N H"]:
    """Causal attention of packed query tokens, each over the pages of its own request.

    Row b's query tokens are query_start[b]:query_start[b + 1], the last of its kv_lens[b] tokens, whose keys are already in
    the pool. The token at position p sees positions max(0, p - window + 1) to p.

    Args:
        q: queries.
        kv_pages: one layer's pool.
        page_tables: pages of each row, in order; entries past kv_lens are never read.
        query_start: start of each row's tokens in q; its last entry is the number of tokens in use.
        kv_lens: keys of each row, 0 for an unused row.
        num_single_rows: rows with exactly one token come first; this is how many there are. With T = B there are no others.
        sinks: a logit for each head that takes part in the softmax without a value (gpt-oss).
        scale: factor on q . k.
        window: keys that a token sees, itself included; None for all.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        implementation: the back end; one that cannot do these shapes leaves them to the XLA loops, and says so once.

    Returns:
        [T, N, H], in q's type; rows of tokens not in use are unspecified, and may be NaN.
    """
    arguments = (q, kv_pages, page_tables, query_start, kv_lens, num_single_rows, sinks)
    if implementation == "mosaic_gpu":
        from jaxserve.pallas_kernels.paged_attention import mosaic_gpu

        try:
            out: Array = mosaic_gpu.paged_attention(
                *arguments, scale=scale, window=window, softcap=softcap, decode_only=q.shape[0] == page_tables.shape[0]
            )
            return out
        except NotImplementedError as reason:
            _say_once(f"attention runs without a kernel, as XLA loops: {reason}")
    return xla.paged_attention(*arguments, scale=scale, window=window, softcap=softcap)


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)
