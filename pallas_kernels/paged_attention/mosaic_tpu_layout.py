"""How pages lie in a TPU's memory, and the block sizes of the attention kernel.

A page is [K, page_size, lanes]: a row holds a token's key and value for one kv head side by side, padded to whole lanes. So a
page is one copy, a head's keys are whole tiles, a head_dim of 64 wastes nothing, and heads can be cut over devices.
"""

from __future__ import annotations

from typing import NamedTuple

LANES = 128
PAGE_MULTIPLE = 32  # rows of a tile of 8-bit numbers; a copy moves whole tiles
HEAD_AXIS = 1
VMEM_BYTES = 16 * 2**20  # what a call plans with: a quarter of the smallest chip's (v5p and tpu7x have 64 MiB)
QUERY_ROWS = 256  # query tokens times heads of a group that meet the keys together
KEY_BLOCK = 512  # keys of a block at most; with twice as many the compiler takes twice as long


class Blocks(NamedTuple):
    """Query tokens (a power of 2) and keys that are computed together."""

    query: int
    key: int


def lanes_of(width: int) -> int:
    """Width, padded to whole lanes."""
    return -(-width // LANES) * LANES


def pages_shape(num_pages: int, page_size: int, num_kv_heads: int, width: int) -> tuple[int, int, int, int]:
    """Shape of one layer's pool; width: of key and value together, or of a latent row."""
    return (num_pages, num_kv_heads, page_size, lanes_of(width))


def choose_blocks(num_kv_heads: int, group: int, lanes: int, page_size: int, itemsize: int, *, decode: bool) -> Blocks:
    """Block sizes: as many queries as the matrix unit likes, then as many keys as VMEM has room for.

    Args:
        group: query heads for each kv head.
        itemsize: bytes of a number in the pages.
        decode: rows have one token each.

    Raises:
        ValueError: not one page fits.
    """
    query = 1
    while not decode and 2 * query * group <= QUERY_ROWS or (not decode and query < 8):
        query *= 2
    while True:
        key = max(KEY_BLOCK // page_size, 1) * page_size
        while key >= page_size:
            if vmem_bytes(Blocks(query, key), num_kv_heads, group, lanes, itemsize) <= VMEM_BYTES:
                return Blocks(query, key)
            key = key // 2 // page_size * page_size
        if query <= 8:
            raise ValueError(
                f"{num_kv_heads} kv heads with pages of {page_size} tokens do not fit a TPU's VMEM: lower --block-size, or "
                "raise --tensor-parallel-size"
            )
        query //= 2


def vmem_bytes(blocks: Blocks, num_kv_heads: int, group: int, lanes: int, itemsize: int) -> int:
    """What a call keeps in VMEM: two blocks each of pages, queries, results and new rows, the softmax' state, one head's logits."""
    rows = -(-blocks.query * group // 16) * 16  # whole tiles of 16-bit numbers
    pages = 2 * num_kv_heads * blocks.key * lanes * itemsize
    queries = 2 * (2 * rows + max(blocks.query, 16)) * num_kv_heads * lanes * 2
    state = num_kv_heads * rows * (lanes + 2 * LANES) * 4
    logits = 4 * rows * blocks.key * 4 + 2 * blocks.key * lanes * 4
    return pages + queries + state + logits
