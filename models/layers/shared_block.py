"""Zamba 2's transformer block: several layers go through the same weights, each with low-rank changes of its own."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, CacheSpec, Runtime, StepBatch
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.layers.mlp import ACTIVATIONS
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.rope import Rotation, rotate
from jaxserve.models.spec import NormSpec, SharedSpec


class SharedBlock(nnx.Module):
    """What the layers share: attention over x and the embeddings side by side, then a feed-forward block.

    Attributes:
        qkv: [2 D, K, G + 2, H].
        attention_out: [N, H, D].
        up: [D, 2, F].
        down: [F, D].
    """

    def __init__(self, d_model: int, spec: SharedSpec, norm: NormSpec, dtype: DTypeLike) -> None:
        heads, mlp = spec.attention, spec.mlp
        self.norm = Norm(2 * d_model, norm, dtype)
        kv = (heads.array_kv_heads, heads.group_size + 2, heads.head_dim)
        self.qkv = weight((2 * d_model, *kv), ("embed", "kv_heads", None, None), dtype)
        self.attention_out = weight((heads.num_heads, heads.head_dim, d_model), ("heads", None, "embed"), dtype, contract=2)
        self.mlp_norm = Norm(d_model, norm, dtype)
        self.up = weight((d_model, 2, mlp.dim), ("embed", None, "ffn"), dtype)
        self.up_bias = parameter((2, mlp.dim), (None, "ffn"), dtype) if mlp.bias else None
        self.down = weight((mlp.dim, d_model), ("ffn", "embed"), dtype)
        self.down_bias = parameter((d_model,), ("embed",), dtype) if mlp.bias else None


class SharedUse(nnx.Module):
    """One layer's way through a shared block.

    Attributes:
        qkv_in, qkv_out: [3, 2 D, R] and [3, R, N, H], what is added to q, k and v.
        up_in, up_out: [D, R] and [R, 2, F], what is added to gate and up.
        out: [D, D].
    """

    def __init__(self, d_model: int, spec: SharedSpec, dtype: DTypeLike) -> None:
        heads, rank = spec.attention, spec.rank
        self.spec = spec
        out_axes = (None, None, "heads", None)
        self.qkv_in = parameter((3, 2 * d_model, rank), (None, "embed", None), dtype) if spec.adapts_attention else None
        shape = (3, rank, heads.num_heads, heads.head_dim)
        self.qkv_out = parameter(shape, out_axes, dtype) if spec.adapts_attention else None
        self.up_in = weight((d_model, rank), ("embed", None), dtype)
        self.up_out = weight((rank, 2, spec.mlp.dim), (None, None, "ffn"), dtype)
        self.out = weight((d_model, d_model), ("embed", None), dtype)

    def __call__(
        self,
        block: SharedBlock,
        x: Float[Array, "T D"],
        embedded: Float[Array, "T D"],
        caches: tuple[Array, ...],
        batch: StepBatch,
        rotation: Rotation | None,
        runtime: Runtime,
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """What the layer adds to its mixer's input, and the pages with this step's keys and values."""
        spec, heads, (kv_pages,) = self.spec, self.spec.attention, caches
        both = block.norm(jnp.concatenate([x, embedded], axis=-1))
        qkv = linear(both, block.qkv.get_value())  # [T, K, G + 2, H]
        if self.qkv_in is not None and self.qkv_out is not None:
            pairs = zip(self.qkv_in.get_value(), self.qkv_out.get_value(), strict=True)
            qkv += jnp.stack([linear(linear(both, low), high) for low, high in pairs], axis=2)
        q = qkv[:, :, : heads.group_size].reshape(-1, heads.num_heads, heads.head_dim)
        k, v = qkv[:, :, -2], qkv[:, :, -1]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed, kv_pages = runtime.attend(q, k, v, kv_pages, batch, scale=heads.scale)
        x = block.mlp_norm(linear(mixed, block.attention_out.get_value(), contract=2))
        up = linear(x, block.up.get_value(), value(block.up_bias)) + linear(
            linear(x, self.up_in.get_value()), self.up_out.get_value()
        )
        hidden = ACTIVATIONS[spec.mlp.activation](up[:, 0]) * up[:, 1]
        return linear(linear(hidden, block.down.get_value(), value(block.down_bias)), self.out.get_value()), (kv_pages,)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """Pages of keys and values of its own."""
        return (CacheSpec("full", self.spec.attention.array_kv_heads, self.spec.attention.head_dim),)
