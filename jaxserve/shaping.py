"""What changes a request's logits before sampling: penalties, biases, bans. Dense device state, one row a slot.

A row is written when its request gets the slot, from what the host knows (so preemption and prefix hits lose nothing), and
is kept up to date by the sample program itself. Requests that need none of this have no row, and their logits pass as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.plan import (
    FREQUENCY,
    MIN_POSITION,
    NO_TARGET,
    POSITION,
    PRESENCE,
    REPETITION,
    SHAPED,
    SLOT,
    TARGET,
    bits_to_float,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shaping:
    """By slot and token; without the slot axis it is one request's row.

    Attributes:
        bias: added to the logits; -inf bans a token.
        output_counts: how often the output holds the token.
        in_prompt: whether the prompt holds it.
        held_back: banned until the request's min_tokens are reached.
    """

    bias: Float[Array, "*slots V"]
    output_counts: Int[Array, "*slots V"]
    in_prompt: Bool[Array, "*slots V"]
    held_back: Bool[Array, "*slots V"]


def shape_like(*shape: int) -> Shaping:
    """Abstract Shaping of this shape."""
    struct: Any = jax.ShapeDtypeStruct
    return Shaping(struct(shape, jnp.float32), struct(shape, jnp.int32), struct(shape, jnp.bool_), struct(shape, jnp.bool_))


def set_row(state: Shaping, row: Shaping, slot: Int[Array, ""]) -> Shaping:
    """The state with one slot's row replaced."""
    updated: Shaping = jax.tree.map(lambda s, r: lax.dynamic_update_index_in_dim(s, r, slot, axis=0), state, row)
    return updated


def shape_logits(logits: Float[Array, "S V"], state: Shaping, samples: Int[Array, "S fields"]) -> Float[Array, "S V"]:
    """Logits with each row's own biases, penalties and bans; repetition first, then frequency and presence, as in vLLM."""
    rows = jax.tree.map(lambda s: s.at[samples[:, SLOT]].get(mode="clip"), state)

    def field(index: int) -> Float[Array, "S 1"]:
        return bits_to_float(samples[:, index])[:, None]

    shaped = logits + rows.bias
    seen = rows.in_prompt | (rows.output_counts > 0)
    penalty = jnp.where(seen, field(REPETITION), 1)
    shaped = jnp.where(shaped > 0, shaped / penalty, shaped * penalty)
    shaped -= field(FREQUENCY) * rows.output_counts + field(PRESENCE) * (rows.output_counts > 0)
    too_early = samples[:, POSITION] < samples[:, MIN_POSITION]
    shaped = jnp.where(rows.held_back & too_early[:, None], -jnp.inf, shaped)
    return jnp.where((samples[:, SHAPED] == 1)[:, None], shaped, logits)


def count_tokens(state: Shaping, tokens: Int[Array, " S"], samples: Int[Array, "S fields"]) -> Shaping:
    """The state after these tokens were sampled."""
    counted = (samples[:, TARGET] == NO_TARGET) & (samples[:, SHAPED] == 1)
    counts = state.output_counts.at[samples[:, SLOT], tokens].add(counted.astype(jnp.int32), mode="drop")
    return Shaping(state.bias, counts, state.in_prompt, state.held_back)


def host_row(
    vocab_size: int,
    prompt_ids: list[int],
    output_ids: list[int],
    bias: dict[int, float],
    allowed: tuple[int, ...] | None,
    held_back: frozenset[int],
) -> Shaping:
    """One request's row, on the host."""
    row = Shaping(
        bias=np.full(vocab_size, 0.0 if allowed is None else -np.inf, np.float32),  # type: ignore[arg-type]
        output_counts=np.bincount(output_ids, minlength=vocab_size).astype(np.int32),  # type: ignore[arg-type]
        in_prompt=np.zeros(vocab_size, np.bool_),  # type: ignore[arg-type]
        held_back=np.zeros(vocab_size, np.bool_),  # type: ignore[arg-type]
    )
    values = np.asarray(row.bias)
    if allowed is not None:
        values[list(allowed)] = 0
    for token_id, value in bias.items():
        values[token_id] += value
    np.asarray(row.in_prompt)[prompt_ids] = True
    np.asarray(row.held_back)[list(held_back)] = True
    return row
