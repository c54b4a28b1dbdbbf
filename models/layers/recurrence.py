"""Runs any recurrence over a step's packed tokens, from and to the state that each request keeps in its slot.

Rows with one token take one step each, together; the others go chunk by chunk. Every state is read and written in its slot,
so that a step costs what its own requests cost, however large the pools are; once most slots are in use, all of them are
computed in place. Knows no mixer's maths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models.interface import StepBatch

Tree = Any
"""Arrays in tuples, whose leading axis is what a signature says."""

NO_SLOT = 2**31 - 1
ROW_BLOCK = 16  # rows with one token that a mixed step computes together


def run(
    pools: Tree,
    inputs: Tree,
    batch: StepBatch,
    *,
    step: Callable[[Tree, Tree], tuple[Tree, Tree]],
    chunk: Callable[[Tree, Tree, Bool[Array, " C"]], tuple[Tree, Tree]],
    chunk_size: int,
    empty: float = 0.0,
    advance: Callable[[Tree, Tree, Int[Array, " B"], Bool[Array, " B"]], tuple[Tree, Tree]] | None = None,
) -> tuple[Tree, Tree]:
    """Applies a recurrence to every request of the step.

    Args:
        pools: the states, [slots, ...] each; in place when they are donated.
        inputs: [T, ...] each.
        step: (states [B, ...], inputs [B, ...]) -> (states, outputs [B, ...]): one token of each of B requests.
        chunk: (state, inputs [C, ...], valid [C]) -> (state, outputs [C, ...]): up to C tokens of one request. Those not valid
            are the last ones, and zeros; they must not change the state, and their outputs are not read.
        chunk_size: C.
        empty: what a request's state is filled with before its first token.
        advance: (pools, inputs [B, ...], slots, starts) -> (pools, outputs [B, ...]): a kernel that is `step` in each row's slot, and
            leaves out slots past the pool; their outputs are not read.

    Returns:
        The pools, and the outputs [T, ...]; those of tokens not in use are unspecified.
    """
    if batch.is_decode:
        if advance is not None:
            return advance(pools, inputs, batch.slots, batch.starts)
        if 2 * batch.slots.shape[0] > jax.tree.leaves(pools)[0].shape[0]:
            return _step_in_place(pools, inputs, batch, step, empty)
        states, outputs = step(read_states(pools, batch.slots, batch.starts, empty), inputs)
        return write_states(pools, states, batch.slots), outputs
    num_tokens = batch.token_ids.shape[0]
    chunk_size = min(chunk_size, num_tokens)
    # 1) Rows with one token. They come first, so row b's token is token b.
    inputs = jax.tree.map(lambda x: _pad(x, max(chunk_size, ROW_BLOCK)), inputs)
    outputs = _empty_outputs(pools, inputs, step)
    num_rows = batch.slots.shape[0]
    if advance is not None and num_rows <= num_tokens:
        slots = jnp.where(jnp.arange(num_rows) < batch.num_single_rows, batch.slots, NO_SLOT)
        pools, result = advance(pools, jax.tree.map(lambda x: x[:num_rows], inputs), slots, batch.starts)
        outputs = jax.tree.map(lambda y, new: lax.dynamic_update_slice_in_dim(y, new, 0, 0), outputs, result)
    else:
        pools, outputs = lax.fori_loop(
            0, _cdiv(batch.num_single_rows, ROW_BLOCK), _row_block(batch, inputs, step, empty), (pools, outputs)
        )
    # 2) The others. A chunk may run past its row's end: what it writes there belongs to the rows behind it, which come later.
    lengths = batch.query_start[1:] - batch.query_start[:-1]
    num_chunks = jnp.where(jnp.arange(lengths.shape[0]) < batch.num_single_rows, 0, _cdiv(lengths, chunk_size))
    ends = jnp.cumsum(num_chunks)

    def one_chunk(i: Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        pools, outputs = carry
        row = jnp.sum(ends <= i)
        nth = i - (ends[row] - num_chunks[row])
        at, slot = batch.query_start[row] + nth * chunk_size, batch.slots[row]
        begins = batch.starts[row] & (nth == 0)
        state = jax.tree.map(lambda pool: jnp.where(begins, jnp.asarray(empty, pool.dtype), pool[slot]), pools)
        valid = jnp.arange(chunk_size) < batch.query_start[row + 1] - at
        part = jax.tree.map(lambda x: _rows_or_zero(valid, lax.dynamic_slice_in_dim(x, at, chunk_size)), inputs)
        state, result = chunk(state, part, valid)
        pools = jax.tree.map(lambda pool, new: pool.at[slot].set(new.astype(pool.dtype)), pools, state)
        return pools, jax.tree.map(lambda y, new: lax.dynamic_update_slice_in_dim(y, new, at, 0), outputs, result)

    pools, outputs = lax.fori_loop(0, ends[-1], one_chunk, (pools, outputs))
    return pools, jax.tree.map(lambda y: y[:num_tokens], outputs)


def read_states(pools: Tree, slots: Int[Array, " B"], starts: Bool[Array, " B"], empty: float = 0.0) -> Tree:
    """The state [B, ...] of each row before its first token of this step."""

    def read(pool: Array) -> Array:
        states = pool.at[slots].get(mode="fill", fill_value=empty)
        return jnp.where(starts.reshape(-1, *[1] * (pool.ndim - 1)), jnp.asarray(empty, pool.dtype), states)

    return jax.tree.map(read, pools)


def write_states(pools: Tree, states: Tree, slots: Int[Array, " B"]) -> Tree:
    """The pools with each row's new state; slots past the pool are dropped."""
    return jax.tree.map(lambda pool, new: pool.at[slots].set(new.astype(pool.dtype), mode="drop"), pools, states)


def token_rows(batch: StepBatch) -> Int[Array, " T"]:
    """The row of each token; for tokens not in use, some row."""
    num_tokens, num_rows = batch.token_ids.shape[0], batch.kv_lens.shape[0]
    if batch.is_decode:
        return jnp.arange(num_tokens)
    row = jnp.searchsorted(batch.query_start, jnp.arange(num_tokens), side="right", method="compare_all") - 1
    return jnp.minimum(row, num_rows - 1)


def scan_linear(decay: Float[Array, "C ..."], added: Float[Array, "C ..."], start: Float[Array, ...]) -> Float[Array, "C ..."]:
    """h[t] = decay[t] * h[t - 1] + added[t] for every t, in log2(C) steps, from h[-1] = start."""

    def combine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    states: Array = lax.associative_scan(combine, (decay, added.at[0].add(decay[0] * start)))[1]
    return states


def _step_in_place(
    pools: Tree, inputs: Tree, batch: StepBatch, step: Callable[[Tree, Tree], tuple[Tree, Tree]], empty: float
) -> tuple[Tree, Tree]:
    """One token of each row, computed slot by slot: states are read and written once, where gathering them moves each twice."""
    num_slots, num_rows = jax.tree.leaves(pools)[0].shape[0], batch.slots.shape[0]
    row = jnp.full(num_slots, num_rows).at[batch.slots].set(jnp.arange(num_rows), mode="drop")
    used, starts = row < num_rows, batch.starts.at[row].get(mode="clip")

    def where(chosen: Bool[Array, " slots"], x: Array | float, pool: Array) -> Array:
        return jnp.where(chosen.reshape(-1, *[1] * (pool.ndim - 1)), jnp.asarray(x, pool.dtype), pool)

    states, outputs = step(
        jax.tree.map(lambda pool: where(starts, empty, pool), pools), jax.tree.map(lambda x: x.at[row].get(mode="clip"), inputs)
    )
    pools = jax.tree.map(lambda pool, new: where(used, new, pool), pools, states)
    return pools, jax.tree.map(lambda y: y.at[batch.slots].get(mode="clip"), outputs)


def _row_block(
    batch: StepBatch, inputs: Tree, step: Callable[[Tree, Tree], tuple[Tree, Tree]], empty: float
) -> Callable[[Array, tuple[Tree, Tree]], tuple[Tree, Tree]]:
    single = jnp.arange(batch.slots.shape[0]) < batch.num_single_rows
    slots = _pad(jnp.where(single, batch.slots, NO_SLOT), ROW_BLOCK, NO_SLOT)
    starts = _pad(batch.starts, ROW_BLOCK)

    def row_block(i: Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        pools, outputs = carry
        at = i * ROW_BLOCK
        part, slot, begins = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, ROW_BLOCK), (inputs, slots, starts))
        states, result = step(read_states(pools, slot, begins, empty), part)
        outputs = jax.tree.map(lambda y, new: lax.dynamic_update_slice_in_dim(y, new, at, 0), outputs, result)
        return write_states(pools, states, slot), outputs

    return row_block


def _empty_outputs(pools: Tree, inputs: Tree, step: Callable[[Tree, Tree], tuple[Tree, Tree]]) -> Tree:
    """Zeros for what `step` gives for every (padded) input row."""
    num_rows = jax.tree.leaves(inputs)[0].shape[0]
    states = jax.tree.map(lambda pool: jax.ShapeDtypeStruct((num_rows, *pool.shape[1:]), pool.dtype), pools)
    return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(step, states, inputs)[1])


def _rows_or_zero(chosen: Bool[Array, " C"], x: Array) -> Array:
    """x's rows: tokens not in use may be NaN, which no factor of 0 removes."""
    return jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def _pad(x: Array, count: int, value: Any = 0) -> Array:
    return jnp.pad(x, ((0, count), *[(0, 0)] * (x.ndim - 1)), constant_values=value)


def _cdiv(a: Array, b: int) -> Array:
    return (a + b - 1) // b
