"""Attention whose values have fewer dimensions than its keys. Pages hold zeros behind them."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers.attention import Attention, qk_norm
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.layers.quantized import Fp8Rows
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.spec import NarrowValueAttentionSpec


class NarrowValueAttention(Attention):
    """As Attention, with projections of their own.

    Attributes:
        q: [D, K, G, H]; k: [D, K, H]; v: [D, K, V].
        out: [N, V, D].
    """

    spec: NarrowValueAttentionSpec

    def _make_projections(self, d_model: int, dtype: DTypeLike) -> None:
        spec, kv_heads = self.spec, self.spec.array_kv_heads
        q, k, v = (kv_heads, spec.group_size, spec.head_dim), (kv_heads, spec.head_dim), (kv_heads, spec.value_dim)
        self.q = weight((d_model, *q), ("embed", "kv_heads", None, None), dtype)
        self.k = weight((d_model, *k), ("embed", "kv_heads", None), dtype)
        self.v = weight((d_model, *v), ("embed", "kv_heads", None), dtype)
        self.q_bias = parameter(q, ("kv_heads", None, None), dtype) if spec.qkv_bias else None
        self.k_bias = parameter(k, ("kv_heads", None), dtype) if spec.qkv_bias else None
        self.v_bias = parameter(v, ("kv_heads", None), dtype) if spec.qkv_bias else None
        self.q_norm = qk_norm(spec, spec.num_heads, "heads", dtype)
        self.k_norm = qk_norm(spec, kv_heads, "kv_heads", dtype)

    def _project(
        self, x: Float[Array, "T D"] | Fp8Rows, batch: StepBatch, rotation: Rotation | None
    ) -> tuple[Array, Array, Array]:
        spec = self.spec
        q = linear(x, self.q.get_value(), value(self.q_bias)).reshape(-1, spec.num_heads, spec.head_dim)
        k = linear(x, self.k.get_value(), value(self.k_bias))
        v = linear(x, self.v.get_value(), value(self.v_bias))
        if not spec.qk_norm_after_rope:
            q, k = self._normalize(q, k)
        q, k, v = self._placed(q, k, v, batch, rotation)
        return q, k, jnp.pad(v, ((0, 0), (0, 0), (0, spec.head_dim - spec.value_dim)))

    def _mix(
        self, q: Array, k: Array, v: Array, kv_pages: Array, batch: StepBatch, runtime: Runtime
    ) -> tuple[Float[Array, "T N V"], Array]:
        mixed, kv_pages = super()._mix(q, k, v, kv_pages, batch, runtime)
        return mixed[..., : self.spec.value_dim], kv_pages
