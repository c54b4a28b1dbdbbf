"""What both attention kernels of Hopper share: the shapes that they serve, and how rows lie in a tile and in shared memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu

plgpu: Any = _mosaic_gpu  # not typed

LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup's wgmma
LOW = -1e30  # a running maximum starts here: -inf minus -inf would be NaN


def check_decode(q: jax.Array, kv_pages: jax.Array) -> None:
    """Raises NotImplementedError for shapes and types that the kernel does not serve."""
    num_heads, head_dim = q.shape[-2:]
    _, page_size, kv_heads, _ = kv_pages.shape
    if head_dim not in (64, 128, 256):
        raise NotImplementedError(f"head_dim must be 64, 128 or 256; got {head_dim}")
    if num_heads % (kv_heads // 2) or num_heads // (kv_heads // 2) > ROWS:
        raise NotImplementedError(f"{num_heads} query heads over {kv_heads // 2} kv heads; at most {ROWS} a kv head")
    if page_size not in (16, 32, 64, 128, 256):
        raise NotImplementedError(f"page_size must be 16, 32, 64, 128 or 256; got {page_size}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries must be bfloat16 or float16; got {q.dtype}")
    if kv_pages.dtype != q.dtype and kv_pages.dtype != jnp.float8_e4m3fn:
        raise NotImplementedError(f"pages must be {q.dtype} like the queries or float8_e4m3fn; got {kv_pages.dtype}")


def group_rows(x: jax.Array, num_kv_heads: int) -> tuple[jax.Array, int]:
    """[B, N, ...] -> ([B, chunks, rows, ...], kv heads a chunk); rows are a multiple of 8, as a bulk copy into a tile wants.

    A plain reshape if G divides 8 or 8 divides G: a chunk then holds the heads of 8 / G kv heads, and the other heads' rows
    are harmless. Else each kv head's rows are padded.
    """
    num, heads, *rest = x.shape
    group = heads // num_kv_heads
    if 8 % group == 0 and heads % 8 == 0:
        return x.reshape(num, heads // 8, 8, *rest), 8 // group
    x = x.reshape(num, num_kv_heads, group, *rest)
    return jnp.pad(x, [(0, 0), (0, 0), (0, -group % 8), *[(0, 0)] * len(rest)]), 1


def tiles(head_dim: int, itemsize: int) -> tuple[Any, Any]:
    """The layout in shared memory of rows of `head_dim` numbers: 128 bytes wide, as wgmma and bulk copies want it, or a row."""
    width = min(128 // itemsize, head_dim)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * itemsize)


def box_index(kv: Any, tables: Any, row: Any, token: Any, hi: Any, *, page_size: int, visible: Any | None) -> jax.Array:
    """Which box of the pool [boxes, box, ...] holds the tokens from `token` on, inside a kernel; one past them all for none.

    Args:
        hi: tokens from here on are not wanted; a bulk copy from out of bounds fills with zeros.
        visible: nor are those before, whose pages may be gone; None where there is no window.
    """
    num_boxes, box = kv.shape[:2]
    wanted = token < hi
    if visible is not None:
        wanted &= token + box > visible
    page = tables[row, lax.div(jnp.where(wanted, token, hi - 1), page_size)]
    index = page * (page_size // box) + lax.div(lax.rem(token, page_size), box)
    return jnp.where(wanted, index, num_boxes)
