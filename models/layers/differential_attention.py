"""Differential attention (https://arxiv.org/abs/2410.05258): one softmax over keys minus another."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import CacheSpec, Runtime, StepBatch
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.linear import parameter
from jaxserve.models.spec import DifferentialAttentionSpec


class DifferentialAttention(Attention):
    """The first half of the heads minus lambda times the second. Each reads both halves of the values.

    In the cache each kv head is two: its key with a value of either half.

    Attributes:
        lambdas: [4, H], q and k of the first half's factor, then of the second's.
    """

    spec: DifferentialAttentionSpec

    def __init__(self, d_model: int, spec: DifferentialAttentionSpec, dtype: DTypeLike) -> None:
        super().__init__(d_model, spec, dtype)
        self.lambdas = parameter((4, spec.head_dim), (None, None), dtype)

    def _cache_spec(self) -> CacheSpec:
        spec = super()._cache_spec()
        return replace(spec, num_kv_heads=2 * spec.num_kv_heads)

    def _mix(
        self, q: Array, k: Array, v: Array, kv_pages: Array, batch: StepBatch, runtime: Runtime
    ) -> tuple[Float[Array, "T N H"], Array]:
        spec = self.spec
        heads, head_dim, kv_heads, group = spec.num_heads, spec.head_dim, spec.num_kv_heads, spec.group_size
        half = kv_heads // 2
        both = jnp.stack((jnp.tile(v[:, :half], (1, 2, 1)), jnp.tile(v[:, half:], (1, 2, 1))), axis=2)  # [T, K, 2, H]
        v = both.reshape(-1, 2 * kv_heads, head_dim)
        twice = jnp.repeat(q.reshape(-1, kv_heads, 1, group, head_dim), 2, axis=2).reshape(-1, 2 * heads, head_dim)
        mixed, kv_pages = self._attend(twice, jnp.repeat(k, 2, axis=1), v, kv_pages, batch, runtime)
        mixed = mixed.reshape(-1, 2, half, 2, group, head_dim).swapaxes(3, 4)  # values of both halves side by side
        mixed = mixed.reshape(-1, 2, heads // 2, 2 * head_dim).astype(jnp.float32)
        q1, k1, q2, k2 = self.lambdas.get_value().astype(jnp.float32)
        factor = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + spec.start
        mixed = mixed[:, 0] - factor * mixed[:, 1]
        mixed *= jax.lax.rsqrt(jnp.mean(jnp.square(mixed), axis=-1, keepdims=True) + spec.eps) * (1 - spec.start)
        return mixed.reshape(q.shape).astype(q.dtype), kv_pages
