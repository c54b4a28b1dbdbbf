"""Grouped-query attention over the paged cache. The pages themselves belong to the runtime's kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, CacheKind, CacheSpec, Runtime, StepBatch
from jaxserve.models.layers.linear import linear, linear_of_parts, linear_unscaled, parameter, value, weight
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight
from jaxserve.models.layers.rope import Rotation, rotate
from jaxserve.models.layers.unsummed import multiply_in_parts
from jaxserve.models.spec import AttentionSpec, TemperatureSpec


class Attention(nnx.Module):
    """Projects to q, k and v, writes k and v to the pages, attends over them, projects back.

    Attributes:
        qkv: [D, K, G + 2, H]: for each kv head its G query heads, then k, then v, so that cutting K cuts all three alike.
        gate: [D, N, H], or [D, N].
        out: [N, H, D].
    """

    def __init__(self, d_model: int, spec: AttentionSpec, dtype: DTypeLike) -> None:
        head_dim = spec.head_dim
        self.spec = spec
        self._make_projections(d_model, dtype)
        gate, gate_axes = ((spec.num_heads,), ("heads",)) if spec.gate_per_head else ((spec.num_heads, head_dim), ("heads", None))
        self.gate = weight((d_model, *gate), ("embed", *gate_axes), dtype) if spec.out_gate else None
        self.gate_bias = parameter(gate, gate_axes, dtype) if spec.gate_bias else None
        self.sinks = parameter((spec.num_heads,), ("heads",), dtype) if spec.sinks else None
        by_head = (spec.num_heads, head_dim)
        self.out_norm = Norm(by_head, spec.out_norm, dtype, ("heads", None), num_axes=2) if spec.out_norm else None
        self.out = weight((spec.num_heads, spec.value_dim, d_model), ("heads", None, "embed"), dtype, contract=2)
        self.out_bias = parameter((d_model,), ("embed",), dtype) if spec.out_bias else None

    def _make_projections(self, d_model: int, dtype: DTypeLike) -> None:
        """What makes q, k and v of the layer's input."""
        spec = self.spec
        heads = (spec.array_kv_heads, spec.group_size + 2, spec.head_dim)
        self.qkv = weight((d_model, *heads), ("embed", "kv_heads", None, None), dtype)
        self.qkv_bias = parameter(heads, ("kv_heads", None, None), dtype) if spec.qkv_bias else None
        self.q_norm = qk_norm(spec, spec.num_heads, "heads", dtype)
        self.k_norm = qk_norm(spec, spec.array_kv_heads, "kv_heads", dtype)
        self.v_norm = Norm(spec.head_dim, spec.v_norm, dtype, (None,)) if spec.v_norm else None

    def __call__(
        self,
        x: Float[Array, "T D"] | Fp8Rows,
        caches: tuple[Array, ...],
        batch: StepBatch,
        rotation: Rotation | None,
        runtime: Runtime,
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """Gives the layer's output and the pages with this step's keys and values."""
        mixed, caches = self.heads(x, caches, batch, rotation, runtime)
        out = linear_of_parts(mixed, self.out.get_value(), value(self.out_bias), batch=batch, runtime=runtime, contract=2)
        return out, caches

    def heads(
        self,
        x: Float[Array, "T D"] | Fp8Rows,
        caches: tuple[Array, ...],
        batch: StepBatch,
        rotation: Rotation | None,
        runtime: Runtime,
    ) -> tuple[Float[Array, "T N H"], tuple[Array, ...]]:
        """What the output projection reads, and the pages."""
        (kv_pages,) = caches
        mixed, kv_pages = self._read(x, kv_pages, batch, rotation, runtime)
        if self.gate is not None:
            gate = linear(x, self.gate.get_value(), value(self.gate_bias))
            gate = jax.nn.sigmoid(gate) if self.spec.gate_activation == "sigmoid" else jax.nn.softplus(gate)
            mixed *= gate[..., None] if self.spec.gate_per_head else gate
        if self.out_norm is not None:
            mixed = self.out_norm(mixed)
        return mixed, (kv_pages,)

    @property
    def ends_in_product(self) -> bool:
        """Whether nothing happens to the last product."""
        return self.out_bias is None

    def readers(self) -> tuple[Array | Fp8Weight, ...]:
        """The weights that x meets."""
        return tuple(w.get_value() for w in (self.qkv, self.gate) if w is not None)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """What the layer keeps: pages of keys and values."""
        return (self._cache_spec(),)

    def _cache_spec(self) -> CacheSpec:
        spec = self.spec
        kind: CacheKind = "chunked" if spec.chunk is not None else "full" if spec.window is None else "sliding"
        return CacheSpec(kind, spec.array_kv_heads, spec.head_dim, spec.window or spec.chunk)

    def _read(
        self, x: Float[Array, "T D"] | Fp8Rows, kv_pages: Array, batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T N H"], Array]:
        """What each head reads, and the pages."""
        if rotation is not None and runtime.rotates_and_writes and self._only_rotates:
            qkv, scales = self._unscaled(x, runtime)
            q, kv_pages = runtime.rotate_and_write(qkv, rotation, kv_pages, batch, scales, **self._norms())
            return self._attend(q, None, None, kv_pages, batch, runtime)
        return self._mix(*self._project(x, batch, rotation), kv_pages, batch, runtime)

    def _unscaled(self, x: Array | Fp8Rows, runtime: Runtime) -> tuple[Array, tuple[Array | None, Array | None]]:
        """q, k and v as one, which may be in parts, and what rows and columns are yet to be multiplied by."""
        weight, bias = self.qkv.get_value(), value(self.qkv_bias)
        product = multiply_in_parts(x, weight, runtime, devices=runtime.num_devices) if bias is None else None
        if product is None:
            return linear_unscaled(x, weight, bias)
        return product.parts if len(product.parts) > 1 else product.parts[0], (product.row_scales, product.scales)

    @property
    def _only_rotates(self) -> bool:
        """Whether q and k are rotated, heads as a whole and in halves, and nothing happens to the projection but norms in front."""
        spec, rope, norm = self.spec, self.spec.rope, self.spec.qk_norm
        is_other = (spec.v_norm, spec.clip, spec.temperature) != (None,) * 3 or spec.value_multiplier != 1.0
        is_whole = rope is not None and not rope.interleaved and rope.rotary_dim == spec.head_dim
        is_by_head = spec.qk_norm_over == "head" and not spec.qk_norm_after_rope
        is_normal = norm is None or (norm.kind == "rms" and norm.gain and not norm.bias and is_by_head)
        return type(self) is Attention and is_whole and is_normal and not is_other

    def _norms(self) -> dict[str, Any]:
        """What Runtime.rotate_and_write takes for the norms of q and k."""
        norm, gains = self.spec.qk_norm, [value(norm.weight) for norm in (self.q_norm, self.k_norm) if norm is not None]
        return {} if norm is None else {"gains": tuple(gains), "eps": norm.eps, "offset": 1.0 if norm.unit_offset else 0.0}

    def _project(
        self, x: Float[Array, "T D"] | Fp8Rows, batch: StepBatch, rotation: Rotation | None
    ) -> tuple[Array, Array, Array]:
        """q [T, N, H], k and v [T, K, H]."""
        spec = self.spec
        qkv = linear(x, self.qkv.get_value(), value(self.qkv_bias))  # [T, K, G + 2, H]
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        by_head = spec.qk_norm is not None and spec.qk_norm.kind == "rms" and spec.qk_norm_over == "head"
        together = by_head and not spec.qk_norm_after_rope
        if together and self.q_norm is not None and self.k_norm is not None:
            # One reduction over the whole projection, and what follows melts into rope: 2 GPU kernels instead of 6.
            scale = self.q_norm.scale(qkv)
            q = self.q_norm.gained(q * scale[:, :, :-2]).astype(x.dtype)
            k = self.k_norm.gained(k * scale[:, :, -2]).astype(x.dtype)
        q = q.reshape(-1, spec.num_heads, spec.head_dim)
        if not together and not spec.qk_norm_after_rope:
            q, k = self._normalize(q, k)
        if self.v_norm is not None:
            v = self.v_norm(v)
        return self._placed(q, k, v, batch, rotation)

    def _placed(
        self, q: Array, k: Array, v: Array, batch: StepBatch, rotation: Rotation | None
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Array]:
        """q and k with their positions, and what else comes once all are normalised."""
        spec = self.spec
        if spec.value_multiplier != 1.0:
            v *= spec.value_multiplier
        if spec.clip is not None:
            q, k, v = (jnp.clip(x, -spec.clip, spec.clip) for x in (q, k, v))
        if rotation is not None:
            interleaved = spec.rope is not None and spec.rope.interleaved
            q, k = rotate(q, rotation, interleaved), rotate(k, rotation, interleaved)
        if spec.qk_norm_after_rope:
            q, k = self._normalize(q, k)
        if spec.temperature is not None:
            q = heated(q, spec.temperature, batch)
        return q, k, v

    def _normalize(self, q: Array, k: Array) -> tuple[Array, Array]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def _mix(
        self, q: Array, k: Array, v: Array, kv_pages: Array, batch: StepBatch, runtime: Runtime
    ) -> tuple[Float[Array, "T N H"], Array]:
        """What each head reads, and the pages with k and v."""
        return self._attend(q, k, v, kv_pages, batch, runtime)

    def _attend(
        self, q: Array, k: Array | None, v: Array | None, kv_pages: Array, batch: StepBatch, runtime: Runtime
    ) -> tuple[Float[Array, "T N H"], Array]:
        spec = self.spec
        return runtime.attend(
            q,
            k,
            v,
            kv_pages,
            batch,
            scale=spec.scale,
            window=spec.window,
            chunk=spec.chunk,
            softcap=spec.softcap,
            sinks=value(self.sinks),
            alibi=None if spec.alibi is None else jnp.asarray(spec.alibi, jnp.bfloat16 if spec.alibi_rounded else jnp.float32),
        )


def heated(q: Float[Array, "T N H"], spec: TemperatureSpec, batch: StepBatch) -> Float[Array, "T N H"]:
    """q, grown with its position."""
    steps = jnp.floor((batch.positions.astype(jnp.float32) + spec.offset) / spec.length)
    return (q * (1 + spec.scale * jnp.log1p(steps))[:, None, None]).astype(q.dtype)


def qk_norm(spec: AttentionSpec, heads: int, axis: str, dtype: DTypeLike) -> Norm | None:
    if spec.qk_norm is None:
        return None
    if spec.qk_norm_over == "head":
        return Norm(spec.head_dim, spec.qk_norm, dtype, (None,))
    return Norm((heads, spec.head_dim), spec.qk_norm, dtype, (axis, None), num_axes=2 if spec.qk_norm_over == "all_heads" else 1)
