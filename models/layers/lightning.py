"""Lightning attention: linear attention with a constant decay for each head, normalised and gated (MiniMax)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec, StepBatch
from jaxserve.models.layers import decayed_attention
from jaxserve.models.layers.linear import linear, parameter, weight
from jaxserve.models.layers.mlp import ACTIVATIONS
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.recurrent_spec import LightningSpec


class Lightning(nnx.Module):
    """h[t] = exp(-decay) h[t - 1] + v[t] k[t], y[t] = h[t] q[t].

    Attributes:
        qkv: [D, N, 3, H].
        norm: [N, H], gain of the norm over all heads.
        gate: [D, N, H].
        out: [N, H, D].
    """

    def __init__(self, d_model: int, spec: LightningSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        heads, dim = spec.num_heads, spec.head_dim
        self.qkv = weight((d_model, heads, 3, dim), ("embed", "heads", None, None), dtype)
        self.norm = parameter((heads, dim), ("heads", None), dtype, mean=1.0)
        self.gate = weight((d_model, heads, dim), ("embed", "heads", None), dtype)
        self.out = weight((heads, dim, d_model), ("heads", None, "embed"), dtype, contract=2)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        spec = self.spec
        qkv = ACTIVATIONS[spec.activation](linear(x, self.qkv.get_value())).astype(jnp.float32)  # [T, N, 3, H]
        decay = jnp.broadcast_to(-jnp.array(spec.decays, jnp.float32), qkv.shape[:2])
        inputs = decayed_attention.Inputs(q=qkv[:, :, 0], k=qkv[:, :, 1], v=qkv[:, :, 2], decay=decay)
        pool, y = decayed_attention.run(caches[0], inputs, batch, runtime)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(-2, -1), keepdims=True) + spec.norm_eps)
        y *= self.norm.get_value().astype(jnp.float32) * jax.nn.sigmoid(linear(x, self.gate.get_value()).astype(jnp.float32))
        return linear(y.astype(x.dtype), self.out.get_value(), contract=2), (pool,)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The state of every head."""
        spec = self.spec
        return (StateSpec((spec.num_heads, spec.head_dim, spec.head_dim), ("heads", None, None), jnp.float32),)
