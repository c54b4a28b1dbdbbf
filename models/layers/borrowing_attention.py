"""Attention without keys and values of its own: it reads those that an earlier layer keeps."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StepBatch
from jaxserve.models.layers.attention import Attention, qk_norm
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.layers.quantized import Fp8Rows
from jaxserve.models.layers.rope import Rotation, rotate
from jaxserve.models.spec import BorrowingAttentionSpec


class BorrowingAttention(Attention):
    """Projects to q and attends over the pages that it is handed, which are the other layer's.

    Attributes:
        q: [D, K, G, H].
    """

    spec: BorrowingAttentionSpec

    def _make_projections(self, d_model: int, dtype: DTypeLike) -> None:
        spec = self.spec
        heads = (spec.array_kv_heads, spec.group_size, spec.head_dim)
        self.q = weight((d_model, *heads), ("embed", "kv_heads", None, None), dtype)
        self.q_bias = parameter(heads, ("kv_heads", None, None), dtype) if spec.qkv_bias else None
        self.q_norm = qk_norm(spec, spec.num_heads, "heads", dtype)

    def _read(
        self, x: Float[Array, "T D"] | Fp8Rows, kv_pages: Array, batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T N H"], Array]:
        spec = self.spec
        q = linear(x, self.q.get_value(), value(self.q_bias)).reshape(-1, spec.num_heads, spec.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if rotation is not None:
            q = rotate(q, rotation, spec.rope is not None and spec.rope.interleaved)
        return self._attend(q, None, None, kv_pages, batch, runtime)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """It keeps nothing."""
        return ()
