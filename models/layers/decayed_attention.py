"""Linear attention whose state decays by one factor for each head and token: h[t] = exp(decay[t]) h[t - 1] + v[t] k[t], y = h q.

Mamba 2's state space (its duality: https://arxiv.org/abs/2405.21060) and lightning attention are both this.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers import recurrence
from jaxserve.pallas_kernels import decayed_state

CHUNK = 128  # tokens that attend to each other directly; earlier ones are in the state


class Inputs(NamedTuple):
    """What each token brings, in float32; the heads of a group share q and k.

    Attributes:
        q, k: [.., groups, N].
        v: [.., heads, P].
        decay: [.., heads], the logarithm of the factor, at most 0.
    """

    q: Array
    k: Array
    v: Array
    decay: Array


def run(
    pool: Float[Array, "slots heads P N"], inputs: Inputs, batch: StepBatch, runtime: Runtime
) -> tuple[Float[Array, "slots heads P N"], Float[Array, "T heads P"]]:
    """The recurrence over a step's tokens; see recurrence.run. Heads of several devices are XLA's to cut."""
    has_kernel = runtime.attention == "mosaic_gpu" and runtime.has_one_device and decayed_state.serves(pool)
    result: tuple[Array, Array] = recurrence.run(
        pool, inputs, batch, step=step, chunk=chunk, chunk_size=CHUNK, advance=_advance if has_kernel else None
    )
    return result


def _advance(pool: Array, inputs: Inputs, slots: Array, starts: Array) -> tuple[Array, Array]:
    return decayed_state.advance(pool, *inputs, slots, starts)


def step(states: Float[Array, "B heads P N"], inputs: Inputs) -> tuple[Array, Array]:
    """One token of each of B requests; see recurrence.run."""
    batch, heads, dim, _ = states.shape
    groups = inputs.q.shape[1]
    q, k = (x[:, :, None, None] for x in (inputs.q, inputs.k))  # [B, groups, 1, 1, N]
    grouped = states.reshape(batch, groups, heads // groups, dim, -1)
    v = inputs.v.reshape(batch, groups, heads // groups, dim, 1)
    decay = jnp.exp(inputs.decay).reshape(batch, groups, heads // groups, 1, 1)
    grouped = grouped * decay + v * k
    return grouped.reshape(states.shape), jnp.sum(grouped * q, axis=-1).reshape(batch, heads, dim)


def chunk(state: Float[Array, "heads P N"], inputs: Inputs, valid: Bool[Array, " C"]) -> tuple[Array, Array]:
    """Up to C tokens of one request; see recurrence.run."""
    heads, dim, size = state.shape
    length, groups, _ = inputs.q.shape
    decay = jnp.cumsum(jnp.where(valid[:, None], inputs.decay, 0), axis=0)  # [C, heads], from the chunk's start
    v = jnp.where(valid[:, None, None], inputs.v, 0).reshape(length, groups, heads // groups, dim)
    state = state.reshape(groups, heads // groups, dim, size)
    # 1) Among the chunk's own tokens.
    causal = jnp.tril(jnp.ones((length, length), bool))[..., None]
    between = jnp.exp(jnp.where(causal, decay[:, None] - decay[None], -jnp.inf))  # [C, C, heads]: from s, the second, to t
    between = between.reshape(length, length, groups, heads // groups)
    scores = _einsum("tgn,sgn->tsg", inputs.q, inputs.k)
    y = _einsum("tsgr,sgrp->tgrp", scores[..., None] * between, v)
    # 2) What the state holds of earlier ones.
    since = jnp.exp(decay).reshape(length, groups, -1, 1)
    y += _einsum("tgn,grpn->tgrp", inputs.q, state) * since
    # 3) The state behind the chunk.
    until = jnp.exp(decay[-1] - decay).reshape(length, groups, -1, 1)
    state = state * jnp.exp(decay[-1]).reshape(groups, -1, 1, 1) + _einsum("sgn,sgrp->grpn", inputs.k, v * until)
    return state.reshape(heads, dim, size), y.reshape(length, heads, dim)


def _einsum(formula: str, *arrays: Array) -> Array:
    return jnp.einsum(formula, *arrays, precision=jax.lax.Precision.HIGHEST)
