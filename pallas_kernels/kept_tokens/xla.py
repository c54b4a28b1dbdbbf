"""Thresholds by XLA, on any device: digit by digit over the bits of the logits, each a pass over them."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.kept_tokens.api import Cuts, order_of

_LEAST = int(np.iinfo(np.int32).min)


def least_kept(logits: Float[Array, "S V"], cuts: Cuts) -> Int[Array, " S"]:
    """See api.least_kept."""
    vocab_size = logits.shape[1]
    scaled = logits * cuts.scale[:, None]
    order, top = order_of(scaled), jnp.max(scaled, axis=-1)
    top_k = jnp.where((cuts.top_k <= 0) | (cuts.top_k > vocab_size), vocab_size, cuts.top_k)
    kth = largest_threshold(order, jnp.ones_like(scaled), top_k.astype(jnp.float32))

    weights = jnp.where(order >= kth[:, None], jnp.exp(scaled - top[:, None]), 0)
    nucleus = largest_threshold(order, weights, cuts.top_p * jnp.sum(weights, axis=-1))
    kept = jnp.where(cuts.top_p < 1, jnp.maximum(kth, nucleus), kth)
    return jnp.maximum(kept, order_of(top + cuts.log_min_p))


def largest_threshold(order: Int[Array, "S V"], weights: Float[Array, "S V"], wanted: Float[Array, " S"]) -> Int[Array, " S"]:
    """The largest t for which the weights of the entries >= t still add up to `wanted`.

    A GPU reads the logits in about the time that it takes to compare them 15 times, so that digits of 4 bits need a quarter of
    the passes; a CPU compares no faster than it reads.
    """
    by_bits, by_fours = partial(search, digit_bits=1), partial(search, digit_bits=4)
    threshold: Array = lax.platform_dependent(order, weights, wanted, default=by_bits, cuda=by_fours)
    return threshold


def search(
    order: Int[Array, "S V"], weights: Float[Array, "S V"], wanted: Float[Array, " S"], *, digit_bits: int
) -> Int[Array, " S"]:
    """largest_threshold, digit by digit from the top; each takes one pass."""
    zero = jnp.zeros((), weights.dtype)

    def next_digit(i: Array, threshold: Int[Array, " S"]) -> Int[Array, " S"]:
        shift = 32 - digit_bits * (i + 1)
        candidates = [threshold | (jnp.int32(digit) << shift) for digit in range(1, 2**digit_bits)]
        above = [jnp.where(order >= (candidate ^ _LEAST)[:, None], weights, 0) for candidate in candidates]
        # One reduction of many operands, where sums of their own would be kernels of their own.
        sums = lax.reduce(above, [zero] * len(above), lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (1,))
        digit = jnp.sum(jnp.stack(sums) >= wanted, axis=0, dtype=jnp.int32)
        return threshold | (digit << shift)

    threshold: Array = lax.fori_loop(0, 32 // digit_bits, next_digit, jnp.zeros(order.shape[0], jnp.int32))
    return threshold ^ _LEAST
