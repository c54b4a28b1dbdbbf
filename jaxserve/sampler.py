"""Logits -> tokens and log probabilities, on the device. Every parameter is data; only the Mode is compiled in.

No sort over the vocabulary: top-k, top-p and min-p are one threshold a row (pallas_kernels/kept_tokens), which is exact.
"""

from __future__ import annotations

from enum import Enum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from jaxserve.pallas_kernels.drawn_tokens import find_kernel, gumbel
from jaxserve.pallas_kernels.kept_tokens import Cuts, least_kept, order_of
from jaxserve.pallas_kernels.paged_attention import Implementation
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
_TILE = 128  # tokens of which the likeliest ones are looked for together
_LARGE_TILE = 256  # those of which the likeliest one is
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
    implementation: Implementation = "xla",
) -> tuple[dict[str, Array], Shaping | None]:
    """Samples one token a row.

    A row's token depends on its own logits and parameters alone: the noise is drawn from (seed, position).

    Args:
        logits: float32.
        samples: the plan's sample rows (fields of plan.py).
        mode: see Mode.
        shaping: the penalties and biases by slot, for the modes that have them.
        is_branching: find out on the device what these rows need of the mode, and do no more.
        implementation: what finds the tokens that top-k, top-p and min-p keep, and draws.

    Returns:
        (outputs, shaping after these tokens). Outputs: tokens [S], NO_TOKEN where there is none; with Mode.LOGPROBS also logprob and rank of the token
        (or of the row's target) [S], top_ids and top_logprobs [S, MAX_LOGPROBS], and all_logprobs [S, V]; log probabilities
        are those of the logits as they came.
    """
    raw = logits.astype(jnp.float32)
    if is_branching:
        tokens = _tokens_as_needed(raw, samples, shaping, implementation)
    else:
        tokens = _tokens(raw, samples, shaping, mode=mode, implementation=implementation)
    if shaping is not None:
        shaping = count_tokens(shaping, tokens, samples)
    outputs = {"tokens": tokens}
    if mode is Mode.LOGPROBS:
        targets = samples[:, TARGET]
        outputs |= _logprobs(raw, jnp.where(targets == NO_TARGET, tokens, targets))
    return outputs, shaping


def _tokens_as_needed(
    raw: Float[Array, "S V"], samples: Int[Array, "S fields"], shaping: Shaping | None, implementation: Implementation
) -> Int[Array, " S"]:
    """The tokens by the least mode that these rows need.

    The noise is drawn before the branch that adds it: XLA for TPUs took minutes to compile it into each search for the best
    token, and XLA for CPUs made loops of it that took twice as long.
    """
    needed = _needed(samples)
    modes = [m for m in (Mode.PLAIN, Mode.FULL, Mode.SHAPED) if shaping is not None or not m.needs_shaping]

    def drawn() -> Array:
        branches = [partial(_tokens, mode=m, implementation=implementation) for m in modes]
        tokens: Array = lax.switch(needed - 1, branches, raw, samples, shaping, _noise(samples, raw.shape[1]))
        return tokens

    tokens: Array = lax.cond(needed > 0, drawn, lambda: _tokens(raw, samples, shaping, mode=Mode.GREEDY))
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
    noise: Float[Array, "S V"] | None = None,
    *,
    mode: Mode,
    implementation: Implementation = "xla",
) -> Int[Array, " S"]:
    """The rows' tokens; NO_TOKEN where the best logit is not finite.

    Args:
        noise: where it is not to be made here, in a branch.
    """
    logits = shape_logits(raw, shaping, samples) if shaping is not None and mode.needs_shaping else raw
    if mode is Mode.GREEDY:
        place, best = _find_largest(_infinite_nan(logits))
    else:
        cuts, is_drawn = cuts_of(samples), bits_to_float(samples[:, TEMPERATURE]) > 0
        keeps_all = jnp.full(logits.shape[:1], np.iinfo(np.int32).min, jnp.int32)
        least = keeps_all if mode is Mode.PLAIN else least_kept(logits, cuts, implementation)
        if (draw := find_kernel(implementation, logits.shape[1])) is not None:
            place, best = draw(logits, cuts.scale, least, is_drawn, _row_keys(samples))
        else:
            noise = _noise(samples, logits.shape[1]) if noise is None else noise
            logits = _infinite_nan(logits)
            # A choice, so that no compiler adds the noise within the product: every mode must round alike.
            scaled = jnp.where(is_drawn[:, None], logits * cuts.scale[:, None], logits)
            kept = jnp.where(order_of(scaled) >= least[:, None], scaled, -jnp.inf)
            place, best = _find_largest(jnp.where(is_drawn[:, None], kept + noise, logits))
    return jnp.where(jnp.isfinite(best), place, NO_TOKEN)


def _infinite_nan(x: Float[Array, "S V"]) -> Float[Array, "S V"]:
    """The numbers, with infinity for NaN: XLA for CPUs overlooks NaN in a maximum, and its order may be below a threshold."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _find_largest(x: Float[Array, "S V"]) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Where each row's largest number is, the first of equals, and the number.

    The largest of each tile comes first: XLA finds it as fast as it reads, and takes several times as long where it is to keep places.
    """
    tiles = _in_tiles(x, _LARGE_TILE)
    highest = jnp.max(tiles, axis=-1)
    tile = jnp.argmax(highest, axis=-1).astype(jnp.int32)[:, None]
    place = jnp.argmax(jnp.take_along_axis(tiles, tile[..., None], axis=1)[:, 0], axis=-1)
    return tile[:, 0] * _LARGE_TILE + place.astype(jnp.int32), jnp.take_along_axis(highest, tile, axis=-1)[:, 0]


def _in_tiles(x: Float[Array, "S V"], size: int) -> Float[Array, "S tiles size"]:
    """Tiles of each row; the last one ends with minus infinity."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=-jnp.inf).reshape(x.shape[0], -1, size)


def cuts_of(samples: Int[Array, "S fields"]) -> Cuts:
    """What each row keeps: everything where its temperature is 0, which costs a kernel nothing."""
    temperature = bits_to_float(samples[:, TEMPERATURE])
    is_drawn = temperature > 0
    return Cuts(
        scale=1 / jnp.where(is_drawn, temperature, 1),
        top_k=jnp.where(is_drawn, samples[:, TOP_K], 0),
        top_p=jnp.where(is_drawn, bits_to_float(samples[:, TOP_P]), 1),
        min_p=jnp.where(is_drawn, bits_to_float(samples[:, MIN_P]), 0),
    )


def _row_keys(samples: Int[Array, "S fields"]) -> Int[Array, "S 2"]:
    """The words of each row's key: fold_in(seed, position)."""

    def row_key(fields: Int[Array, " fields"]) -> UInt[Array, " 2"]:
        seed = lax.bitcast_convert_type(fields[jnp.array([SEED_HIGH, SEED_LOW])], jnp.uint32)
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), fields[POSITION]))

    return lax.bitcast_convert_type(jax.vmap(row_key)(samples), jnp.int32)


def _noise(samples: Int[Array, "S fields"], vocab_size: int) -> Float[Array, "S V"]:
    """Gumbel noise, whose argmax with the logits is a draw from their softmax."""
    keys = _row_keys(samples)
    # Numbers that come from memory: of numbers that it makes, XLA for GPUs keeps 256 x 151,936 noise bits for another kernel.
    counter = lax.optimization_barrier(jnp.arange(vocab_size, dtype=jnp.int32)[None])
    return gumbel(keys[:, :1], keys[:, 1:], counter)


def _logprobs(logits: Float[Array, "S V"], tokens: Int[Array, " S"]) -> dict[str, Array]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    top_logprobs, top_ids = _likeliest(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    return {
        "logprob": chosen[:, 0],
        "rank": rank,
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
        "all_logprobs": logprobs,
    }


def _likeliest(logprobs: Float[Array, "S V"], count: int) -> tuple[Float[Array, "S count"], Int[Array, "S count"]]:
    """lax.top_k, which sorts, of as many tiles as there are tokens to find: those with the largest maxima hold them all."""
    rows, vocab_size = logprobs.shape
    if vocab_size <= 2 * count * _TILE:
        values, ids = lax.top_k(logprobs, count)
        return values, ids
    tiles = _in_tiles(logprobs, _TILE)
    _, chosen = lax.top_k(jnp.max(tiles, axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)  # of equal values the first one counts
    values, places = lax.top_k(jnp.take_along_axis(tiles, chosen[:, :, None], axis=1).reshape(rows, -1), count)
    ids = jnp.take_along_axis(chosen, places // _TILE, axis=1) * _TILE + places % _TILE
    return values, ids
