"""Paged attention on Hopper GPUs: puts the decode and the prefill kernel behind the op's signature.

Owns the choice of kernels for a program; work lists and kernels are in the files beside it.
"""

import functools

import jax
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_decode import decode
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import default_split, plan_decode, plan_prefill
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_prefill import prefill
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import ROWS


@functools.partial(
    jax.jit, static_argnames=["scale", "window", "softcap", "decode_only", "shares_pages"]
)  # layers share one lowering
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
    decode_only: bool = False,
    shares_pages: bool = False,
) -> Float[Array, "T N H"]:
    """See api.paged_attention. The work lists are pure functions of the lengths: the compiler makes them once for all layers.

    Args:
        decode_only: no row has more than one token, and row b's is q[b] (T = B): the prefill kernel is left out.
        shares_pages: pages that several rows with one token have in common are read for all of them at once.

    Raises:
        NotImplementedError: for shapes and types that the kernels do not serve (check_decode).
    """
    num_rows, max_pages = page_tables.shape
    max_len = max_pages * kv_pages.shape[1]
    if decode_only and q.shape[0] != num_rows:
        raise ValueError(f"a decode-only program has a token a row; got {q.shape[0]} tokens and {num_rows} rows")
    num_kv_heads = kv_pages.shape[2] // 2
    split = default_split(num_rows, num_kv_heads) * 2 // kv_pages.dtype.itemsize  # 8-bit pages want longer ones
    plan = plan_decode(
        kv_lens,
        num_single_rows,
        num_kv_heads=num_kv_heads,
        max_len=max_len,
        window=window,
        split=split,
        fill=decode_only,
        page_tables=page_tables,
        seats=ROWS * num_kv_heads // q.shape[1] if shares_pages else 1,
    )
    if decode_only:
        result = decode(q, kv_pages, page_tables, plan, sinks, scale=scale, softcap=softcap)
        assert result is not None
        return result
    # Both kernels write their own tokens of one buffer.
    tiles = plan_prefill(
        query_start,
        kv_lens,
        num_single_rows,
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        window=window,
    )
    out = jax.empty_ref(jax.typeof(q))
    decode(q, kv_pages, page_tables, plan, sinks, scale=scale, softcap=softcap, out=out)
    prefill(q, kv_pages, page_tables, tiles, sinks, scale=scale, softcap=softcap, out=out)
    merged: jax.Array = out[...]
    return merged
