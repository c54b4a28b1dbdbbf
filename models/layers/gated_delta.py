"""Gated delta net: linear attention that, before it stores a value under a key, takes out what it would have read there."""

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
from jaxserve.models.recurrent_spec import GatedDeltaSpec

CHUNK = 64  # tokens whose updates are solved for together


class Inputs(NamedTuple):
    """What each token brings, in float32; N key heads, each serving R value heads.

    Attributes:
        q, k: [.., N, K], of unit length but for q's scale.
        v: [.., N, R, V].
        decay: [.., N, R], the logarithm of the state's factor.
        beta: [.., N, R], how much of the new value is written.
    """

    q: Array
    k: Array
    v: Array
    decay: Array
    beta: Array


class GatedDelta(nnx.Module):
    """S[t] = exp(g[t]) S[t - 1] (I - beta k k^T) + beta v k^T, y[t] = S[t] q[t], normalised and gated by silu(z[t]).

    N key heads of K dimensions, each serving R value heads of V dimensions.

    Attributes:
        qk: [D, 2, N, K].
        vz: [D, 2, N, R, V], v before z.
        ba: [D, 2, N, R], what beta and the decay are made of.
        conv_qk, conv_v: [kernel, ..].
        a_log: [N, R], the decay is -exp(a_log) softplus(a + dt_bias).
        norm: [V].
        out: [N, R, V, D].
    """

    def __init__(self, d_model: int, spec: GatedDeltaSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        keys = (spec.num_key_heads, spec.key_dim)
        heads = (spec.num_key_heads, spec.num_value_heads // spec.num_key_heads)
        values = (*heads, spec.value_dim)
        self.qk = weight((d_model, 2, *keys), ("embed", None, "heads", None), dtype)
        self.vz = weight((d_model, 2, *values), ("embed", None, "heads", None, None), dtype)
        self.ba = weight((d_model, 2, *heads), ("embed", None, "heads", None), dtype)
        self.conv_qk = taps((spec.conv_kernel, 2, *keys), (None, None, "heads", None), dtype)
        self.conv_v = taps((spec.conv_kernel, *values), (None, "heads", None, None), dtype)
        self.dt_bias = parameter(heads, ("heads", None), jnp.float32)
        self.a_log = parameter(heads, ("heads", None), jnp.float32)
        self.norm = parameter((spec.value_dim,), (None,), dtype, mean=1.0)
        self.out = weight((*values, d_model), ("heads", None, None, "embed"), dtype, contract=3)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        spec, (qk_pool, v_pool, pool) = self.spec, caches
        vz = linear(x, self.vz.get_value())
        ba = linear(x, self.ba.get_value()).astype(jnp.float32)
        qk, qk_pool = short_conv(linear(x, self.qk.get_value()), qk_pool, self.conv_qk.get_value(), None, batch)
        v, v_pool = short_conv(vz[:, 0], v_pool, self.conv_v.get_value(), None, batch)
        qk, v = (ACTIVATIONS[spec.activation](part).astype(jnp.float32) for part in (qk, v))
        qk *= jax.lax.rsqrt(jnp.sum(jnp.square(qk), axis=-1, keepdims=True) + 1e-6)
        inputs = Inputs(
            q=qk[:, 0] * spec.key_dim**-0.5,
            k=qk[:, 1],
            v=v,
            decay=-jnp.exp(self.a_log.get_value()) * jax.nn.softplus(ba[:, 1] + self.dt_bias.get_value()),
            beta=jax.nn.sigmoid(ba[:, 0]) * (2.0 if spec.negative_eigenvalues else 1.0),
        )
        pool, y = recurrence.run(pool, inputs, batch, step=_step, chunk=_chunk, chunk_size=CHUNK)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + spec.norm_eps)
        y = y * self.norm.get_value().astype(jnp.float32) * jax.nn.silu(vz[:, 1].astype(jnp.float32))
        return linear(y.astype(x.dtype), self.out.get_value(), contract=3), (qk_pool, v_pool, pool)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The convolution's last inputs, and the state of every value head."""
        spec, kept = self.spec, self.spec.conv_kernel - 1
        heads = (spec.num_key_heads, spec.num_value_heads // spec.num_key_heads)
        return (
            StateSpec((kept, 2, spec.num_key_heads, spec.key_dim), (None, None, "heads", None)),
            StateSpec((kept, *heads, spec.value_dim), (None, "heads", None, None)),
            StateSpec((*heads, spec.value_dim, spec.key_dim), ("heads", None, None, None), jnp.float32),
        )


def _step(states: Float[Array, "B N R V K"], x: Inputs) -> tuple[Array, Array]:
    k = x.k[:, :, None, None]
    states = states * jnp.exp(x.decay)[..., None, None]
    change = (x.v - jnp.sum(states * k, axis=-1)) * x.beta[..., None]  # [B, N, R, V]
    states = states + change[..., None] * k
    return states, jnp.sum(states * x.q[:, :, None, None], axis=-1)


def _chunk(state: Float[Array, "N R V K"], x: Inputs, valid: Bool[Array, " C"]) -> tuple[Array, Array]:
    """The updates of all tokens at once, by the triangular system that they make up (section 3.3 of the paper)."""
    length = valid.shape[0]
    decay = jnp.cumsum(jnp.where(valid[:, None, None], x.decay, 0), axis=0)  # [C, N, R], from the chunk's start
    beta = jnp.where(valid[:, None, None], x.beta, 0)
    lower = jnp.tril(jnp.ones((length, length), bool))[..., None, None]
    between = jnp.exp(jnp.where(lower, decay[:, None] - decay[None], -jnp.inf))  # [C, C, N, R]: from s, the second, to t
    since = jnp.exp(decay)[..., None]
    # 1) What each token writes, given what those before it in the chunk wrote.
    overlap = _einsum("tnk,snk->tsn", x.k, x.k)[..., None] * between * beta[:, None]
    read = _einsum("tnk,nrvk->tnrv", x.k, state) * since
    wanted = (x.v - read) * beta[..., None]
    written = jax.scipy.linalg.solve_triangular(
        overlap.transpose(2, 3, 0, 1), wanted.transpose(1, 2, 0, 3), lower=True, unit_diagonal=True
    ).transpose(2, 0, 1, 3)  # [C, N, R, V]
    # 2) What each token reads.
    scores = _einsum("tnk,snk->tsn", x.q, x.k)[..., None] * between
    y = _einsum("tnk,nrvk->tnrv", x.q, state) * since + _einsum("tsnr,snrv->tnrv", scores, written)
    # 3) The state behind the chunk.
    until = jnp.exp(decay[-1] - decay)[..., None]
    state = state * jnp.exp(decay[-1])[..., None, None] + _einsum("snrv,snk->nrvk", written * until, x.k)
    return state, y


def _einsum(formula: str, *arrays: Array) -> Array:
    return jnp.einsum(formula, *arrays, precision=jax.lax.Precision.HIGHEST)
