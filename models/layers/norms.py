"""RMS and layer normalisation, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import LogicalAxes
from jaxserve.models.layers.linear import parameter, value
from jaxserve.models.spec import NormSpec


class Norm(nnx.Module):
    """Normalises the last axis, then applies a gain and maybe a bias."""

    def __init__(self, dim: int, spec: NormSpec, dtype: DTypeLike, axes: LogicalAxes = ("embed",)) -> None:
        self.spec = spec
        self.weight = parameter((dim,), axes, dtype, mean=0.0 if spec.unit_offset else 1.0)
        self.bias = parameter((dim,), axes, dtype) if spec.bias else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        y = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.spec.eps)
        gain = self.weight.get_value().astype(jnp.float32)
        y *= 1.0 + gain if self.spec.unit_offset else gain
        bias = value(self.bias)
        if bias is not None:
            y += bias.astype(jnp.float32)
        return y.astype(x.dtype)
