"""Room for small arrays."""

from __future__ import annotations

import jax
import numpy as np

from jaxserve.small_arrays import COUNT, leave_room


def test_each_hole_lies_between_arrays_that_stay() -> None:
    made: list[jax.Array] = []

    def make(size: int) -> jax.Array:
        made.append(jax.device_put(np.zeros(size, np.uint8)))
        return made[-1]

    kept = leave_room([100, 3000], make)
    assert [array.nbytes for array in made] == [100] * 2 * COUNT + [3000] * 2 * COUNT
    assert [array.is_deleted() for array in made] == [True, False] * 2 * COUNT
    assert kept == [array for array in made if not array.is_deleted()]
