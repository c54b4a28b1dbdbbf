"""Room on a GPU for the small arrays that come and go in each step, apart from the programs' temporary memory. Knows sizes only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax

COUNT = 8  # more arrays of a size than two steps have


def leave_room(num_bytes: Iterable[int], make: Callable[[int], jax.Array]) -> list[jax.Array]:
    """Leaves holes of these sizes between arrays that stay.

    XLA's allocator takes the smallest hole that an array fits in. Without holes of their own a step's plan and tokens would take the
    beginning of the free memory, and the next program's temporary memory begin behind them, now here and now there; a CUDA graph whose
    memory has moved is updated, which takes the host more than a millisecond a step (bench/NOTES.md).

    Args:
        num_bytes: of arrays that come and go.
        make: allocates an array of so many bytes.

    Returns:
        What has to be kept for as long as the holes are wanted.
    """
    kept = []
    for size in num_bytes:
        arrays = jax.block_until_ready([make(size) for _ in range(2 * COUNT)])  # neighbours, as they are allocated in turn
        kept += arrays[1::2]
        for array in arrays[::2]:
            array.delete()
    return kept
