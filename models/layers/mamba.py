"""Mamba's mixer: a convolution, then a state space with input-dependent steps, each channel with its own small state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec, StepBatch
from jaxserve.models.layers import recurrence
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.layers.mlp import ACTIVATIONS
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.short_conv import short_conv, taps
from jaxserve.models.recurrent_spec import MambaSpec

CHUNK = 32  # tokens whose states are in memory at once: C x channels x state_dim values

Inputs = tuple[Array, Array, Array, Array]
"""x [.., I], dt [.., I], B [.., N] and C [.., N] of each token, in float32."""


class Mamba(nnx.Module):
    """h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] x[t], y[t] = C[t] h[t] + D x[t], gated by silu(z[t]).

    I channels, N values of state each, R the rank of dt.

    Attributes:
        into: [D, 2, I], x before z.
        select: [I, R + 2 N]: dt, B and C of each token.
        dt_proj: [R, I].
        a_log: [I, N], A = -exp(a_log).
        skip: [I], D of the formula.
    """

    def __init__(self, d_model: int, spec: MambaSpec, dtype: DTypeLike) -> None:
        self.spec, self.dtype = spec, dtype
        dim, state, rank = spec.dim, spec.state_dim, spec.dt_rank
        self.into = weight((d_model, 2, dim), ("embed", None, "ffn"), dtype)
        self.into_bias = parameter((2, dim), (None, "ffn"), dtype) if spec.proj_bias else None
        self.conv = taps((spec.conv_kernel, dim), (None, "ffn"), dtype)
        self.conv_bias = parameter((dim,), ("ffn",), dtype) if spec.conv_bias else None
        self.select = weight((dim, rank + 2 * state), ("ffn", None), dtype)
        self.dt_proj = weight((rank, dim), (None, "ffn"), dtype)
        self.dt_bias = parameter((dim,), ("ffn",), jnp.float32)
        self.a_log = parameter((dim, state), ("ffn", None), jnp.float32)
        self.skip = parameter((dim,), ("ffn",), jnp.float32, mean=1.0)
        norm = spec.inner_norm
        self.dt_norm = None if norm is None else Norm(rank, norm, dtype, (None,))
        self.b_norm = None if norm is None else Norm(state, norm, dtype, (None,))
        self.c_norm = None if norm is None else Norm(state, norm, dtype, (None,))
        self.out = weight((dim, d_model), ("ffn", "embed"), dtype)
        self.out_bias = parameter((d_model,), ("embed",), dtype) if spec.proj_bias else None

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        spec, (conv_pool, pool) = self.spec, caches
        into = linear(x, self.into.get_value(), value(self.into_bias))  # [T, 2, I]
        gate = into[:, 1].astype(jnp.float32)
        u, conv_pool = short_conv(into[:, 0], conv_pool, self.conv.get_value(), value(self.conv_bias), batch)
        u = ACTIVATIONS[spec.activation](u)
        dt, b, c = self._select(u)
        inputs = (u.astype(jnp.float32), dt, b, c)
        pool, y = recurrence.run(pool, inputs, batch, step=self._step, chunk=self._chunk, chunk_size=CHUNK)
        y = (y + inputs[0] * self.skip.get_value()) * jax.nn.silu(gate)
        return linear(y.astype(x.dtype), self.out.get_value(), value(self.out_bias)), (conv_pool, pool)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The convolution's last inputs, and the state of every channel."""
        spec = self.spec
        conv = StateSpec((spec.conv_kernel - 1, spec.dim), (None, "ffn"))
        return conv, StateSpec((spec.dim, spec.state_dim), ("ffn", None), jnp.float32)

    def _select(self, u: Float[Array, "T I"]) -> tuple[Array, Array, Array]:
        rank, state = self.spec.dt_rank, self.spec.state_dim
        dt, b, c = jnp.split(linear(u, self.select.get_value()), (rank, rank + state), axis=-1)
        if self.dt_norm is not None and self.b_norm is not None and self.c_norm is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        dt = linear(dt, self.dt_proj.get_value()).astype(jnp.float32)
        return jax.nn.softplus(dt + self.dt_bias.get_value()), b.astype(jnp.float32), c.astype(jnp.float32)

    def _discretise(self, inputs: Inputs) -> tuple[Array, Array]:
        u, dt, b, _ = inputs
        return jnp.exp(-jnp.exp(self.a_log.get_value()) * dt[..., None]), (dt * u)[..., None] * b[..., None, :]

    def _step(self, states: Float[Array, "B I N"], inputs: Inputs) -> tuple[Array, Array]:
        decay, added = self._discretise(inputs)
        states = states * decay + added
        return states, jnp.sum(states * inputs[3][..., None, :], axis=-1)

    def _chunk(self, state: Float[Array, "I N"], inputs: Inputs, valid: Bool[Array, " C"]) -> tuple[Array, Array]:
        u, dt, b, c = inputs
        dt = jnp.where(valid[:, None], dt, 0)  # a step of no time changes nothing
        states = recurrence.scan_linear(*self._discretise((u, dt, b, c)), state)
        return states[-1], jnp.sum(states * c[:, None, :], axis=-1)
