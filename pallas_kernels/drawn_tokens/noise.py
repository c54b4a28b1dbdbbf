"""Gumbel noise by Threefry. Words are int32, and arrays those of any back end, so that kernels make the same noise as XLA."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

ROUNDS = 13


def gumbel(key0: Int[Array, ...], key1: Int[Array, ...], counter: Int[Array, ...]) -> Float[Array, ...]:
    """The noise of each counter.

    Noise is most of what drawing takes, so it has as few rounds of Threefry as pass every test of BigCrush: Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    bits = lax.shift_right_logical(threefry(key0, key1, counter, ROUNDS), jnp.int32(9))
    uniform = lax.bitcast_convert_type(bits | jnp.int32(0x3F800000), jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(uniform, np.finfo(np.float32).tiny)))


def threefry(key0: Int[Array, ...], key1: Int[Array, ...], counter: Int[Array, ...], rounds: int) -> Int[Array, ...]:
    """The first word of Threefry-2x32 for the counters (counter, 0)."""
    keys = key0, key1, key0 ^ key1 ^ jnp.int32(0x1BD11BDA)
    x, y = counter + key0, jnp.broadcast_to(key1, jnp.broadcast_shapes(key1.shape, counter.shape))
    for i in range(rounds):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        x = x + y
        y = ((y << turn) | lax.shift_right_logical(y, jnp.int32(32 - turn))) ^ x
        if i % 4 == 3:
            n = i // 4 + 1
            x, y = x + keys[n % 3], y + keys[(n + 1) % 3] + n
    return x
