"""Doge's attention: what a key's value says raises its score, whatever the query."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import CacheSpec, Runtime, StepBatch
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.spec import ValueLogitAttentionSpec


class ValueLogitAttention(Attention):
    """Each key carries its extra logit as one more dimension, which q meets with 1 / scale.

    Attributes:
        value_logits: [K, H, K], from all values of a token to a number for each kv head.
        value_logits_scale: [K], A in exp(A * softplus(number)).
    """

    spec: ValueLogitAttentionSpec

    def __init__(self, d_model: int, spec: ValueLogitAttentionSpec, dtype: DTypeLike) -> None:
        super().__init__(d_model, spec, dtype)
        kv_heads = spec.num_kv_heads
        self.value_logits = weight((kv_heads, spec.head_dim, kv_heads), ("kv_heads", None, None), dtype, contract=2)
        self.value_logits_bias = parameter((kv_heads,), (None,), dtype) if spec.qkv_bias else None
        self.value_logits_scale = parameter((kv_heads,), (None,), dtype)

    def _cache_spec(self) -> CacheSpec:
        spec = super()._cache_spec()
        return replace(spec, head_dim=spec.head_dim + 1)

    def _mix(
        self, q: Array, k: Array, v: Array, kv_pages: Array, batch: StepBatch, runtime: Runtime
    ) -> tuple[Float[Array, "T N H"], Array]:
        logits = linear(v, self.value_logits.get_value(), value(self.value_logits_bias), contract=2)  # [T, K]
        logits = jnp.exp(self.value_logits_scale.get_value() * jax.nn.softplus(logits))
        k = jnp.concatenate((k, logits[..., None].astype(k.dtype)), axis=-1)
        q = jnp.concatenate((q, jnp.full((*q.shape[:2], 1), 1 / self.spec.scale, q.dtype)), axis=-1)
        mixed, kv_pages = self._attend(q, k, jnp.pad(v, ((0, 0), (0, 0), (0, 1))), kv_pages, batch, runtime)
        return mixed[..., :-1], kv_pages
