"""Multi-head latent attention (https://arxiv.org/abs/2405.04434) with its weights absorbed: pages hold the latent alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, CacheSpec, Runtime, StepBatch
from jaxserve.models.layers.attention import heated
from jaxserve.models.layers.linear import linear, linear_by_head, linear_of_parts, parameter, value, weight
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.rope import Rotation, rotate
from jaxserve.models.spec import MlaSpec


class Mla(nnx.Module):
    """q . k of a head is (k_up q) . latent, so every head attends to the same latents, and v_up comes after the sum.

    Attributes:
        q_down: [D, Q] and q_up: [Q, N, nope + rope]; where q comes from the model's width at once, q_up: [D, N, nope + rope].
        kv_down: [D, R + rope], to the latent and to the keys' rotated part, which all heads share.
        k_up: [N, nope, R]; v_up: [N, R, v].
        gate: [D, N].
        out: [N, v, D].
    """

    def __init__(self, d_model: int, spec: MlaSpec, dtype: DTypeLike) -> None:
        heads, rank = spec.num_heads, spec.kv_rank
        self.spec = spec
        q_rank = spec.q_rank
        self.q_down = weight((d_model, q_rank), ("embed", None), dtype) if q_rank else None
        self.q_down_bias = parameter((q_rank,), (None,), dtype) if q_rank and spec.bias else None
        self.q_norm = Norm(q_rank, spec.latent_norm, dtype, (None,)) if q_rank else None
        self.q_up = weight((q_rank or d_model, heads, spec.nope_dim + spec.rope_dim), (None, "heads", None), dtype)
        self.kv_down = weight((d_model, rank + spec.rope_dim), ("embed", None), dtype)
        self.kv_down_bias = parameter((rank + spec.rope_dim,), (None,), dtype) if spec.bias else None
        self.kv_norm = Norm(rank, spec.latent_norm, dtype, (None,))
        self.k_up = parameter((heads, spec.nope_dim, rank), ("heads", None, None), dtype, std=rank**-0.5)
        self.v_up = parameter((heads, rank, spec.v_dim), ("heads", None, None), dtype, std=rank**-0.5)
        self.gate = weight((d_model, heads), ("embed", "heads"), dtype) if spec.out_gate else None
        self.out = weight((heads, spec.v_dim, d_model), ("heads", None, "embed"), dtype, contract=2)
        self.out_bias = parameter((d_model,), ("embed",), dtype) if spec.bias else None

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """Gives the layer's output and the pages with this step's latents."""
        spec, (pages,) = self.spec, caches
        q = x
        if self.q_down is not None and self.q_norm is not None:
            q = self.q_norm(linear(x, self.q_down.get_value(), value(self.q_down_bias)))
        q = linear(q, self.q_up.get_value())  # [T, N, nope + rope]
        q_rope = self._rotated(q[..., spec.nope_dim :], rotation)
        q_latent = linear_by_head(q[..., : spec.nope_dim], self.k_up.get_value())  # [T, N, R]
        down = linear(x, self.kv_down.get_value(), value(self.kv_down_bias))
        k_rope = self._rotated(down[:, None, spec.kv_rank :], rotation)
        latent = self.kv_norm(down[:, : spec.kv_rank])
        if spec.kv_multiplier != 1.0:
            latent *= spec.kv_multiplier
        latent = jnp.concatenate((latent, k_rope[:, 0]), axis=-1)
        q = jnp.concatenate((q_latent, q_rope), axis=-1)
        if spec.temperature is not None:
            q = heated(q, spec.temperature, batch)
        mixed, pages = runtime.attend_latent(q, latent, pages, batch, scale=spec.scale, value_dim=spec.kv_rank)  # [T, N, R]
        mixed = linear_by_head(mixed, self.v_up.get_value())
        if self.gate is not None:
            mixed *= jax.nn.sigmoid(linear(x, self.gate.get_value()))[..., None]
        out = linear_of_parts(mixed, self.out.get_value(), value(self.out_bias), batch=batch, runtime=runtime, contract=2)
        return out, (pages,)

    def _rotated(self, x: Float[Array, "T N rope"], rotation: Rotation | None) -> Float[Array, "T N rope"]:
        return x if rotation is None or self.spec.rope is None else rotate(x, rotation, self.spec.rope.interleaved)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """One row a token, whole on every device: all heads read all of it."""
        return (CacheSpec("latent", 1, self.spec.kv_rank + self.spec.rope_dim),)
