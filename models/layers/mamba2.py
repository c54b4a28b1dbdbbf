"""Mamba 2's mixer: a convolution, then a state space whose heads each keep a matrix of state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec, StepBatch
from jaxserve.models.layers import decayed_attention
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.layers.mlp import ACTIVATIONS
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.short_conv import short_conv, taps
from jaxserve.models.recurrent_spec import Mamba2Spec


class Mamba2(nnx.Module):
    """h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] B[t], y[t] = h[t] C[t] + D x[t], gated by silu(z[t]) and normalised.

    `heads` of P dimensions and N values of state for each of them; B and C are shared within `groups` of heads.

    Attributes:
        zx: [D, 2, heads, P], z before x.
        bc: [D, 2, groups, N], B before C.
        dt: [D, heads].
        conv_x, conv_bc: [K, ..], the convolution's part on x, and on B and C.
        a_log: [heads], A = -exp(a_log).
        skip: [heads], D of the formula.
        norm: [heads, P], gain of the output's norm.
        out: [heads, P, D].
    """

    def __init__(self, d_model: int, spec: Mamba2Spec, dtype: DTypeLike) -> None:
        self.spec = spec
        heads, groups = (spec.num_heads, spec.head_dim), (2, spec.num_groups, spec.state_dim)
        head_axes, group_axes = ("heads", None), (None, "heads", None)  # groups are cut as their heads are
        self.zx = weight((d_model, 2, *heads), ("embed", None, *head_axes), dtype)
        self.bc = weight((d_model, *groups), ("embed", *group_axes), dtype)
        self.dt = weight((d_model, spec.num_heads), ("embed", "heads"), dtype)
        self.zx_bias = parameter((2, *heads), (None, *head_axes), dtype) if spec.in_bias else None
        self.bc_bias = parameter(groups, group_axes, dtype) if spec.in_bias else None
        self.dt_in_bias = parameter((spec.num_heads,), ("heads",), dtype) if spec.in_bias else None
        self.conv_x = taps((spec.conv_kernel, *heads), (None, *head_axes), dtype)
        self.conv_bc = taps((spec.conv_kernel, *groups), (None, *group_axes), dtype)
        self.conv_x_bias = parameter(heads, head_axes, dtype) if spec.conv_bias else None
        self.conv_bc_bias = parameter(groups, group_axes, dtype) if spec.conv_bias else None
        self.dt_bias = parameter((spec.num_heads,), ("heads",), jnp.float32)
        self.a_log = parameter((spec.num_heads,), ("heads",), jnp.float32)
        self.skip = parameter((spec.num_heads,), ("heads",), jnp.float32, mean=1.0)
        self.norm = parameter(heads, head_axes, dtype, mean=1.0) if spec.norm is not None else None
        self.out = weight((*heads, d_model), (*head_axes, "embed"), dtype, contract=2)
        self.out_bias = parameter((d_model,), ("embed",), dtype) if spec.out_bias else None

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        spec, (x_pool, bc_pool, pool) = self.spec, caches
        by_z, by_x, by_b, by_c, by_dt = spec.multipliers
        zx = linear(x, self.zx.get_value(), value(self.zx_bias))  # [T, 2, heads, P]
        bc = linear(x, self.bc.get_value(), value(self.bc_bias))  # [T, 2, groups, N]
        dt = linear(x, self.dt.get_value(), value(self.dt_in_bias)).astype(jnp.float32) * by_dt
        if (by_x, by_b, by_c) != (1.0, 1.0, 1.0):
            zx *= jnp.array([1.0, by_x], zx.dtype)[:, None, None]
            bc *= jnp.array([by_b, by_c], bc.dtype)[:, None, None]
        u, x_pool = short_conv(zx[:, 1], x_pool, self.conv_x.get_value(), value(self.conv_x_bias), batch)
        bc, bc_pool = short_conv(bc, bc_pool, self.conv_bc.get_value(), value(self.conv_bc_bias), batch)
        u, bc = (ACTIVATIONS[spec.activation](part).astype(jnp.float32) for part in (u, bc))
        dt = jnp.clip(jax.nn.softplus(dt + self.dt_bias.get_value()), spec.dt_min, spec.dt_max)
        decay = -jnp.exp(self.a_log.get_value()) * dt
        inputs = decayed_attention.Inputs(q=bc[:, 1], k=bc[:, 0], v=u * dt[..., None], decay=decay)
        pool, y = decayed_attention.run(pool, inputs, batch, runtime)
        y += u * self.skip.get_value()[:, None]
        y = self._gate(y, zx[:, 0].astype(jnp.float32) * by_z)
        return linear(y.astype(x.dtype), self.out.get_value(), value(self.out_bias), contract=2), (x_pool, bc_pool, pool)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The convolution's last inputs, and the state of every head."""
        spec, kept = self.spec, self.spec.conv_kernel - 1
        return (
            StateSpec((kept, spec.num_heads, spec.head_dim), (None, "heads", None)),
            StateSpec((kept, 2, spec.num_groups, spec.state_dim), (None, None, "heads", None)),
            StateSpec((spec.num_heads, spec.head_dim, spec.state_dim), ("heads", None, None), jnp.float32),
        )

    def _gate(self, y: Float[Array, "T heads P"], z: Float[Array, "T heads P"]) -> Float[Array, "T heads P"]:
        spec, gate = self.spec, jax.nn.silu(z)
        gain = value(self.norm)
        if gain is None:
            return y * gate
        if spec.norm == "after":
            y *= gate
        grouped = y.reshape(y.shape[0], spec.num_groups, -1)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + spec.norm_eps)
        y = (grouped * scale).reshape(y.shape) * gain.astype(jnp.float32)
        return y * gate if spec.norm == "before" else y
