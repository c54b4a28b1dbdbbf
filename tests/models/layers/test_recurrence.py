"""Steps of one token, with few and with most of the slots in use, and chunks that end early."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.interface import StepBatch
from jaxserve.models.layers import decayed_attention, recurrence


def step(state: Any, x: Any) -> tuple[Any, Any]:
    state = 0.5 * state + x[:, None]
    return state, state.sum(axis=1)


def chunk(*_: Any) -> Any:
    raise AssertionError("no row has more than one token")


def test_in_place_and_gathered_are_the_same() -> None:
    """Rows in another order than their slots, one that begins, one of padding; a slot of nobody's holds NaN."""
    slots, lens = jnp.asarray([2, 0, 3, 99]), jnp.asarray([5, 1, 9, 0])
    tokens = jnp.arange(4)
    batch = StepBatch(tokens, tokens, jnp.asarray([0, 1, 2, 3, 3]), lens, tokens[:, None], tokens, jnp.int32(3), slots, tokens)
    pool = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)), jnp.float32).at[1].set(jnp.nan)
    x = jnp.asarray([1.0, 2.0, 3.0, jnp.inf])
    results = {}
    for num_slots in (4, 64):
        run = jax.jit(lambda pool: recurrence.run(pool, x, batch, step=step, chunk=chunk, chunk_size=4, empty=7.0))
        results[num_slots] = run(pool[:num_slots])
    (few, few_out), (many, many_out) = results[4], results[64]
    np.testing.assert_array_equal(few_out[:3], many_out[:3])
    np.testing.assert_array_equal(few, many[:4])
    np.testing.assert_array_equal(many[4:], pool[4:])
    np.testing.assert_array_equal(few[0], np.full(3, 0.5 * 7 + 2))
    assert np.isnan(few[1]).all()


def test_tokens_not_in_use_may_be_nan() -> None:
    """As attention's outputs for them are on a GPU."""
    rng, zero = np.random.default_rng(1), jnp.zeros(1, jnp.int32)
    shapes = {"q": (8, 1, 4), "k": (8, 1, 4), "v": (8, 2, 3), "decay": (8, 2)}
    inputs = decayed_attention.Inputs(**{name: -jnp.asarray(rng.random(shape), jnp.float32) for name, shape in shapes.items()})
    batch = StepBatch(zero, zero, jnp.asarray([0, 5]), zero + 5, zero[:, None], zero, jnp.int32(0), zero, zero)
    batch = dataclasses.replace(batch, token_ids=jnp.zeros(8, jnp.int32))
    options: Any = {"step": decayed_attention.step, "chunk": decayed_attention.chunk, "chunk_size": 8}
    pool = jnp.zeros((1, 2, 3, 4))
    want_state, want = recurrence.run(pool, inputs, batch, **options)
    spoilt = jax.tree.map(lambda x: x.at[5:].set(jnp.nan), inputs)
    state, got = recurrence.run(pool, spoilt, batch, **options)
    np.testing.assert_array_equal(got[:5], want[:5])
    np.testing.assert_array_equal(state, want_state)
    assert np.abs(got[:5]).min() > 0
