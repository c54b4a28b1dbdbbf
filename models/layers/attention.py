"""Grouped-query attention over the paged cache. The pages themselves belong to the runtime's kernels."""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, CacheSpec, Runtime, StepBatch
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.rope import Rotation, rotate
from jaxserve.models.spec import AttentionSpec


class Attention(nnx.Module):
    """Projects to q, k and v, writes k and v to the pages, attends over them, projects back.

    Attributes:
        qkv: [D, K, G + 2, H]: for each kv head its G query heads, then k, then v, so that cutting K cuts all three alike.
        out: [N, H, D].
    """

    def __init__(self, d_model: int, spec: AttentionSpec, dtype: DTypeLike) -> None:
        kv_heads, group, head_dim = spec.array_kv_heads, spec.group_size, spec.head_dim
        self.spec = spec
        self.qkv = weight((d_model, kv_heads, group + 2, head_dim), ("embed", "kv_heads", None, None), dtype)
        self.qkv_bias = parameter((kv_heads, group + 2, head_dim), ("kv_heads", None, None), dtype) if spec.qkv_bias else None
        self.q_norm = Norm(head_dim, spec.qk_norm, dtype, (None,)) if spec.qk_norm else None
        self.k_norm = Norm(head_dim, spec.qk_norm, dtype, (None,)) if spec.qk_norm else None
        self.out = weight((spec.num_heads, head_dim, d_model), ("heads", None, "embed"), dtype, contract=2)
        self.out_bias = parameter((d_model,), ("embed",), dtype) if spec.out_bias else None

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """Gives the layer's output and the pages with this step's keys and values."""
        spec, (kv_pages,) = self.spec, caches
        qkv = linear(x, self.qkv.get_value(), value(self.qkv_bias))  # [T, K, G + 2, H]
        q = qkv[:, :, : spec.group_size].reshape(-1, spec.num_heads, spec.head_dim)
        k, v = qkv[:, :, -2], qkv[:, :, -1]  # [T, K, H]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        kv_pages = runtime.write_kv(kv_pages, k, v, batch)
        mixed = runtime.attend(q, kv_pages, batch, scale=spec.scale, window=spec.window, softcap=spec.softcap)
        return linear(mixed, self.out.get_value(), value(self.out_bias), contract=2), (kv_pages,)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """What the layer keeps: pages of keys and values."""
        spec = self.spec
        return (CacheSpec("full" if spec.window is None else "sliding", spec.array_kv_heads, spec.head_dim, spec.window),)
