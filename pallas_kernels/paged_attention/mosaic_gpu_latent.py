"""Latent attention on Hopper GPUs: puts the one kernel, with a work list for decode and one for prefill, behind the op's signature."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_latent_kernel import attend, check_latent, seat_rows
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import TILE, plan_decode, plan_prefill
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import ROWS


@functools.partial(jax.jit, static_argnames=["scale", "value_dim", "decode_only"])  # layers share one lowering
def paged_attention(
    q: Float[Array, "T N H"],
    pages: Float[Array, "pages page_size 1 H"],
    page_tables: Int[Array, "B max_pages"],
    query_start: Int[Array, " B+1"],
    kv_lens: Int[Array, " B"],
    num_single_rows: Int[Array, ""],
    *,
    scale: float,
    value_dim: int,
    decode_only: bool = False,
) -> Float[Array, "T N V"]:
    """See api.paged_attention. Heads fill a tile's rows, in prefill those of as many tokens as it has room for.

    Args:
        decode_only: no row has more than one token, and row b's is q[b] (T = B).

    Raises:
        NotImplementedError: for shapes and types that the kernel does not serve (check_latent).
    """
    check_latent(q, pages, value_dim)
    num_tokens, num_heads, _ = q.shape
    num_rows, max_pages = page_tables.shape
    tiles, rows = seat_rows(num_heads)
    seated = jnp.pad(q.reshape(num_tokens, tiles, -1, q.shape[-1]), ((0, 0), (0, 0), (0, rows - num_heads // tiles), (0, 0)))
    plan = plan_decode(
        kv_lens,
        num_single_rows,
        num_kv_heads=2 * tiles,  # each half of the values' columns is counted in by itself
        max_len=max_pages * pages.shape[1],
        split=latent_split(num_rows),
        fill=decode_only,
    )
    run = functools.partial(attend, seated, pages[:, :, 0], page_tables, scale=scale, value_dim=value_dim)
    out: jax.Array | None
    if decode_only:
        out = run(plan)
    else:
        per_tile = ROWS // rows
        chunks = plan_prefill(
            query_start,
            kv_lens,
            num_single_rows,
            num_tokens=num_tokens,
            num_heads=TILE // per_tile * tiles,  # a chunk's tiles stand where an ordinary one's heads do
            num_kv_heads=1,
        )
        both = jax.empty_ref(jax.ShapeDtypeStruct((num_tokens, tiles, rows, value_dim), q.dtype))
        run(plan, out=both)
        run(chunks, out=both)
        out = both[...]
    assert out is not None
    return out[:, :, : num_heads // tiles].reshape(num_tokens, num_heads, value_dim)


def latent_split(num_rows: int) -> int:
    """Tokens an item: one block where few rows are to reach every multiprocessor, else few splits, as merging costs time."""
    return 64 if num_rows <= 16 else 512 if num_rows <= 128 else 1024
