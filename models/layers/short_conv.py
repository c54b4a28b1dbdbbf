"""The short causal convolution, each channel alone, that recurrent mixers put before their recurrence."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.models.interface import StepBatch
from jaxserve.models.layers.recurrence import read_states, token_rows, write_states


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
    kept = weight.shape[0] - 1
    if kept == 0:
        alone = x.astype(jnp.float32) * weight[0].astype(jnp.float32)
        return (alone if bias is None else alone + bias.astype(jnp.float32)).astype(x.dtype), pool
    before = read_states(pool, batch.slots, batch.starts)  # [B, K - 1, channels]
    row = token_rows(batch)
    offset = jnp.arange(x.shape[0]) - batch.query_start[row]  # of each token among its row's in this step
    shape = (-1, *[1] * (x.ndim - 1))
    y = x.astype(jnp.float32) * weight[kept].astype(jnp.float32)
    for back in range(1, kept + 1):
        earlier = before[row, jnp.clip(kept + offset - back, 0, kept - 1)]
        tap = jnp.where((offset >= back).reshape(shape), jnp.roll(x, back, axis=0), earlier)
        y += tap.astype(jnp.float32) * weight[kept - back].astype(jnp.float32)
    if bias is not None:
        y += bias.astype(jnp.float32)
    # What stays: the last K - 1 of the inputs kept before and this step's.
    length = batch.query_start[1:] - batch.query_start[:-1]
    last = length[:, None] - kept + jnp.arange(kept)  # [B, K - 1], index among this step's; negative: kept before
    new = x.at[batch.query_start[:-1, None] + last].get(mode="clip")
    old = jnp.take_along_axis(before, jnp.clip(last + kept, 0, kept - 1).reshape(*last.shape, *shape[1:]), axis=1)
    states = jnp.where((last >= 0).reshape(*last.shape, *shape[1:]), new, old)
    return y.astype(x.dtype), write_states(pool, states, batch.slots)
