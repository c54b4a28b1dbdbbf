"""The short causal convolution, each channel alone, that recurrent mixers put before their recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import LogicalAxes, StepBatch
from jaxserve.models.layers.linear import parameter
from jaxserve.models.layers.recurrence import read_states, token_rows, write_states


def taps(shape: Sequence[int], axes: LogicalAxes, dtype: DTypeLike) -> nnx.Param[jax.Array]:
    """A convolution's parameter, [K, ...]. No matmul's `weight`: it is never quantised."""
    return parameter(shape, axes, dtype, std=shape[0] ** -0.5)


def short_conv(
    x: Float[Array, "T ..."],
    pool: Float[Array, "slots K-1 ..."],
    weight: Float[Array, "K ..."],
    bias: Float[Array, ...] | None,
    batch: StepBatch,
) -> tuple[Float[Array, "T ..."], Float[Array, "slots K-1 ..."]]:
    """y[t] = bias + sum of weight[j] * x[t - K + 1 + j] over the K tokens up to t of the same request, in float32.

    Args:
        pool: the last K - 1 inputs of each request, oldest first; zeros before its first token.

    Returns:
        y in x's dtype, and the pool with this step's inputs.
    """
    earlier, pool = last_inputs(x, pool, batch)
    y = sum(tap.astype(jnp.float32) * w.astype(jnp.float32) for tap, w in zip([*earlier, x], weight, strict=True))
    if bias is not None:
        y += bias.astype(jnp.float32)
    return y.astype(x.dtype), pool


def last_inputs(
    x: Float[Array, "T ..."], pool: Float[Array, "slots back ..."], batch: StepBatch
) -> tuple[list[Float[Array, "T ..."]], Float[Array, "slots back ..."]]:
    """For each token, what x was at each of the tokens before it in its request, the furthest back first; and the new pool."""
    back = pool.shape[1]
    if back == 0:
        return [], pool
    before = read_states(pool, batch.slots, batch.starts)  # [B, back, ..]
    if batch.is_decode:
        # Read before it is written: XLA would read the pool where it needs these, and keep a copy of all of it for that.
        before = jax.lax.optimization_barrier(before)
        inputs = [before[:, i] for i in range(back)]
        return inputs, write_states(pool, jnp.concatenate([before[:, 1:], x[:, None].astype(pool.dtype)], axis=1), batch.slots)
    row = token_rows(batch)
    offset = jnp.arange(x.shape[0]) - batch.query_start[row]  # of each token among its row's in this step
    inputs = []
    for distance in range(back, 0, -1):
        kept = before[row, jnp.clip(back + offset - distance, 0, back - 1)]
        inputs.append(jnp.where(_like(offset >= distance, x), jnp.roll(x, distance, axis=0), kept))
    # What stays: the last of those kept before and this step's.
    length = batch.query_start[1:] - batch.query_start[:-1]
    last = length[:, None] - back + jnp.arange(back)  # [B, back], index among this step's; negative: kept before
    new = x.at[batch.query_start[:-1, None] + last].get(mode="clip")
    old = jnp.take_along_axis(before, _like(jnp.clip(last + back, 0, back - 1), new), axis=1)
    return inputs, write_states(pool, jnp.where(_like(last >= 0, new), new, old), batch.slots)


def _like(x: Array, wide: Array) -> Array:
    """x with axes of 1 behind its own, to go with a wider array."""
    return x.reshape(*x.shape, *[1] * (wide.ndim - x.ndim))
