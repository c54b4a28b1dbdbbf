"""Logits -> tokens and log probabilities, on the device. Every parameter is data; only the Mode is compiled in.

No sort over the vocabulary: top-k and top-p are thresholds, found by bisection over the bits of the logits, which is exact
(32 passes halve the range of float32). Ties at a threshold are kept, as in vLLM.
"""

from __future__ import annotations

from enum import Enum
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.plan import (
    MIN_P,
    NO_TARGET,
    POSITION,
    SEED_HIGH,
    SEED_LOW,
    SHAPED,
    TARGET,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    bits_to_float,
)
from jaxserve.shaping import Shaping, count_tokens, shape_logits

MAX_LOGPROBS = 20
NO_TOKEN = -1  # what a row gives whose best logit is not finite: NaN, infinite, or every token banned


class Mode(Enum):
    """What a sample program can do; each covers the ones before it."""

    GREEDY = "greedy"
    PLAIN = "plain"  # temperature
    FULL = "full"  # top-k, top-p, min-p
    SHAPED = "shaped"  # penalties, biases, bans
    LOGPROBS = "logprobs"  # and log probabilities

    @property
    def needs_shaping(self) -> bool:
        return self in (Mode.SHAPED, Mode.LOGPROBS)


def sample(
    logits: Float[Array, "S V"],
    samples: Int[Array, "S fields"],
    mode: Mode,
    shaping: Shaping | None = None,
    *,
    is_branching: bool = False,
) -> tuple[dict[str, Array], Shaping | None]:
    """Samples one token a row.

    A row's token depends on its own logits and parameters alone: the noise is drawn from (seed, position).

    Args:
        logits: float32.
        samples: the plan's sample rows (fields of plan.py).
        mode: see Mode.
        shaping: the penalties and biases by slot, for the modes that have them.
        is_branching: find out on the device what these rows need of the mode, and do no more.

    Returns:
        (outputs, shaping after these tokens). Outputs: tokens [S], NO_TOKEN where there is none; with Mode.LOGPROBS also logprob and rank of the token
        (or of the row's target) [S], top_ids and top_logprobs [S, MAX_LOGPROBS], and all_logprobs [S, V]; log probabilities
        are those of the logits as they came.
    """
    raw = logits.astype(jnp.float32)
    if is_branching:
        tokens = _tokens_as_needed(raw, samples, shaping)
    else:
        noise = None if mode is Mode.GREEDY else _gumbel(samples, raw.shape[1])
        tokens = _tokens(raw, samples, shaping, noise, mode=mode)
    if shaping is not None:
        shaping = count_tokens(shaping, tokens, samples)
    outputs = {"tokens": tokens}
    if mode is Mode.LOGPROBS:
        targets = samples[:, TARGET]
        outputs |= _logprobs(raw, jnp.where(targets == NO_TARGET, tokens, targets))
    return outputs, shaping


def _tokens_as_needed(raw: Float[Array, "S V"], samples: Int[Array, "S fields"], shaping: Shaping | None) -> Int[Array, " S"]:
    """The tokens by the least mode that these rows need.

    The noise is drawn before the branch that adds it: XLA for TPUs took minutes to compile it into each search for the best
    token, and XLA for CPUs made loops of it that took twice as long.
    """
    needed = _needed(samples)
    modes = [m for m in (Mode.PLAIN, Mode.FULL, Mode.SHAPED) if shaping is not None or not m.needs_shaping]

    def drawn() -> Array:
        branches = [partial(_tokens, mode=m) for m in modes]
        tokens: Array = lax.switch(needed - 1, branches, raw, samples, shaping, _gumbel(samples, raw.shape[1]))
        return tokens

    tokens: Array = lax.cond(needed > 0, drawn, lambda: _tokens(raw, samples, shaping, None, mode=Mode.GREEDY))
    return tokens


def _needed(samples: Int[Array, "S fields"]) -> Int[Array, ""]:
    """The least of the modes up to SHAPED that does what every row asks, as its number."""
    drawn = bits_to_float(samples[:, TEMPERATURE]) > 0
    cut = (samples[:, TOP_K] > 0) | (bits_to_float(samples[:, TOP_P]) < 1) | (bits_to_float(samples[:, MIN_P]) > 0)
    return jnp.max(jnp.where(samples[:, SHAPED] == 1, 3, jnp.where(drawn, jnp.where(cut, 2, 1), 0)))


def _tokens(
    raw: Float[Array, "S V"],
    samples: Int[Array, "S fields"],
    shaping: Shaping | None,
    noise: Float[Array, "S V"] | None,
    *,
    mode: Mode,
) -> Int[Array, " S"]:
    """The row's tokens, the best ones without noise; NO_TOKEN where the best logit is not finite."""
    logits = shape_logits(raw, shaping, samples) if shaping is not None and mode.needs_shaping else raw
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the first NaN, where there is one
    tokens = greedy if noise is None else _draw(logits, samples, mode, greedy, noise)
    best = jnp.take_along_axis(logits, greedy[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(best), tokens, NO_TOKEN)


def _draw(
    logits: Float[Array, "S V"],
    samples: Int[Array, "S fields"],
    mode: Mode,
    greedy: Int[Array, " S"],
    noise: Float[Array, "S V"],
) -> Int[Array, " S"]:
    """A token of each row's distribution; the best one where its temperature is 0."""
    temperature = bits_to_float(samples[:, TEMPERATURE])
    scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
    if mode is not Mode.PLAIN:
        scaled = jnp.where(_kept(scaled, samples), scaled, -jnp.inf)
    drawn = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, greedy)


def _gumbel(samples: Int[Array, "S fields"], vocab_size: int) -> Float[Array, "S V"]:
    """Gumbel noise whose argmax with the logits is a draw from their softmax; key = fold_in(seed, position)."""

    def row(fields: Int[Array, " fields"]) -> Float[Array, " V"]:
        seed = lax.bitcast_convert_type(fields[jnp.array([SEED_HIGH, SEED_LOW])], jnp.uint32)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), fields[POSITION])
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(samples)


def _kept(logits: Float[Array, "S V"], samples: Int[Array, "S fields"]) -> Bool[Array, "S V"]:
    """Which tokens top-k, then top-p among those, and min-p leave."""
    vocab_size = logits.shape[1]
    order = _ordered_bits(logits)
    top_k = samples[:, TOP_K]
    top_k = jnp.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    kth = _largest_threshold(order, jnp.ones_like(logits), top_k.astype(jnp.float32))
    kept = order >= kth[:, None]

    weights = jnp.where(kept, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0)
    top_p = bits_to_float(samples[:, TOP_P])
    nucleus = _largest_threshold(order, weights, top_p * jnp.sum(weights, axis=-1))
    kept &= (order >= nucleus[:, None]) | (top_p >= 1)[:, None]
    return kept & (weights >= bits_to_float(samples[:, MIN_P])[:, None])


def _ordered_bits(x: Float[Array, "S V"]) -> UInt[Array, "S V"]:
    """uint32 that compare as the floats do."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(order: UInt[Array, "S V"], weights: Float[Array, "S V"], wanted: Float[Array, " S"]) -> UInt[Array, " S"]:
    """The largest t for which the weights of the entries >= t still add up to `wanted`; bit by bit from the top."""

    def bit(i: Array, threshold: UInt[Array, " S"]) -> UInt[Array, " S"]:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0), axis=-1) >= wanted
        return jnp.where(enough, candidate, threshold)

    threshold: Array = lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))
    return threshold


def _logprobs(logits: Float[Array, "S V"], tokens: Int[Array, " S"]) -> dict[str, Array]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    top_logprobs, top_ids = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    return {
        "logprob": chosen[:, 0],
        "rank": rank,
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
        "all_logprobs": logprobs,
    }
