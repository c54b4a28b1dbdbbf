"""Kimi delta attention (https://arxiv.org/abs/2510.26692): the gated delta rule with a decay for each dimension of the keys."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec, StepBatch
from jaxserve.models.layers import recurrence
from jaxserve.models.layers.linear import linear, parameter, weight
from jaxserve.models.layers.mlp import ACTIVATIONS
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.short_conv import short_conv, taps
from jaxserve.models.recurrent_spec import KimiDeltaSpec

CHUNK = 16  # tokens whose updates are solved for together; what lies between two of them takes an array of [C, C, N, H]


class Inputs(NamedTuple):
    """What each token brings, in float32.

    Attributes:
        q, k: [.., N, H], of unit length but for q's scale.
        v: [.., N, H].
        decay: [.., N, H], the logarithm of the factor on what the state has under each dimension of the keys.
        beta: [.., N], how much of the new value is written.
    """

    q: Array
    k: Array
    v: Array
    decay: Array
    beta: Array


class KimiDelta(nnx.Module):
    """S[t] = S[t - 1] diag(exp(g[t])) (I - beta k k^T) + beta v k^T, y[t] = S[t] q[t], normalised and gated by a sigmoid.

    Attributes:
        qkv: [D, 3, N, H]; conv: [kernel, 3, N, H].
        beta: [D, N].
        decay_in: [D, R] and decay_out: [R, N, H]; where there is no rank, decay_out: [D, N, H]. The decay is
            -exp(a_log) softplus(decay_out(decay_in(x)) + dt_bias), or has a floor.
        gate_in: [D, R] and gate_out: [R, N, H], likewise.
        dt_bias: [N, H]; a_log: [N].
        norm: [H].
        out: [N, H, D].
    """

    def __init__(self, d_model: int, spec: KimiDeltaSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        heads = (spec.num_heads, spec.head_dim)
        self.qkv = weight((d_model, 3, *heads), ("embed", None, "heads", None), dtype)
        self.conv = taps((spec.conv_kernel, 3, *heads), (None, None, "heads", None), dtype)
        self.beta = weight((d_model, spec.num_heads), ("embed", "heads"), dtype)
        rank, width = spec.rank, "embed" if spec.rank is None else None
        self.decay_in, self.gate_in = (weight((d_model, rank), ("embed", None), dtype) if rank else None for _ in range(2))
        self.decay_out, self.gate_out = (weight((rank or d_model, *heads), (width, "heads", None), dtype) for _ in range(2))
        self.dt_bias = parameter(heads, ("heads", None), jnp.float32)
        self.a_log = parameter((spec.num_heads,), ("heads",), jnp.float32)
        self.norm = parameter((spec.head_dim,), (None,), dtype, mean=1.0)
        self.out = weight((*heads, d_model), ("heads", None, "embed"), dtype, contract=2)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        spec, (conv_pool, pool) = self.spec, caches
        qkv, conv_pool = short_conv(linear(x, self.qkv.get_value()), conv_pool, self.conv.get_value(), None, batch)
        qkv = ACTIVATIONS[spec.activation](qkv).astype(jnp.float32)
        qk, v = qkv[:, :2], qkv[:, 2]
        qk *= jax.lax.rsqrt(jnp.sum(jnp.square(qk), axis=-1, keepdims=True) + 1e-6)
        inputs = Inputs(
            q=qk[:, 0] * spec.head_dim**-0.5,
            k=qk[:, 1],
            v=v,
            decay=self._decay(x),
            beta=jax.nn.sigmoid(linear(x, self.beta.get_value()).astype(jnp.float32)),
        )
        pool, y = recurrence.run(pool, inputs, batch, step=_step, chunk=_chunk, chunk_size=CHUNK)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + spec.norm_eps)
        gate = _through(x, self.gate_in, self.gate_out)
        y = y * self.norm.get_value().astype(jnp.float32) * jax.nn.sigmoid(gate)
        return linear(y.astype(x.dtype), self.out.get_value(), contract=2), (conv_pool, pool)

    def _decay(self, x: Float[Array, "T D"]) -> Float[Array, "T N H"]:
        steps = _through(x, self.decay_in, self.decay_out) + self.dt_bias.get_value()
        pace, floor = jnp.exp(self.a_log.get_value())[:, None], self.spec.decay_floor
        return -pace * jax.nn.softplus(steps) if floor is None else floor * jax.nn.sigmoid(pace * steps)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The convolution's last inputs, and the state of every head."""
        spec = self.spec
        return (
            StateSpec((spec.conv_kernel - 1, 3, spec.num_heads, spec.head_dim), (None, None, "heads", None)),
            StateSpec((spec.num_heads, spec.head_dim, spec.head_dim), ("heads", None, None), jnp.float32),
        )


def _through(x: Float[Array, "T D"], first: nnx.Param[Array] | None, second: nnx.Param[Array]) -> Float[Array, "T N H"]:
    return linear(x if first is None else linear(x, first.get_value()), second.get_value()).astype(jnp.float32)


def _step(states: Float[Array, "B N V K"], x: Inputs) -> tuple[Array, Array]:
    k = x.k[:, :, None]
    states = states * jnp.exp(x.decay)[:, :, None]
    change = (x.v - jnp.sum(states * k, axis=-1)) * x.beta[..., None]  # [B, N, V]
    states = states + change[..., None] * k
    return states, jnp.sum(states * x.q[:, :, None], axis=-1)


def _chunk(state: Float[Array, "N V K"], x: Inputs, valid: Bool[Array, " C"]) -> tuple[Array, Array]:
    """The updates of all tokens at once, by the triangular system that they make up."""
    length = valid.shape[0]
    decay = jnp.cumsum(jnp.where(valid[:, None, None], x.decay, 0), axis=0)  # [C, N, K], from the chunk's start
    beta = jnp.where(valid[:, None], x.beta, 0)
    lower = jnp.tril(jnp.ones((length, length), bool))[..., None, None]
    between = jnp.exp(jnp.where(lower, decay[:, None] - decay[None], -jnp.inf)) * x.k  # [C, C, N, K]: s's key, seen from t
    since = jnp.exp(decay)
    # 1) What each token writes, given what those before it in the chunk wrote.
    overlap = _einsum("tnk,tsnk->nts", x.k, between) * beta.T[..., None]
    wanted = (x.v - _einsum("tnk,nvk->tnv", x.k * since, state)) * beta[..., None]
    written = jax.scipy.linalg.solve_triangular(overlap, wanted.swapaxes(0, 1), lower=True, unit_diagonal=True)  # [N, C, V]
    # 2) What each token reads.
    y = _einsum("tnk,nvk->tnv", x.q * since, state) + _einsum("nts,nsv->tnv", _einsum("tnk,tsnk->nts", x.q, between), written)
    # 3) The state behind the chunk.
    state = state * jnp.exp(decay[-1])[:, None] + _einsum("nsv,snk->nvk", written, between[-1])
    return state, y


def _einsum(formula: str, *arrays: Array) -> Array:
    return jnp.einsum(formula, *arrays, precision=jax.lax.Precision.HIGHEST)
