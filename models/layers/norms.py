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
    """Normalises the last axes, then applies a gain and maybe a bias.

    Args:
        shape: of the gain.
        num_axes: how many last axes are normalised together.
    """

    def __init__(
        self, shape: int | tuple[int, ...], spec: NormSpec, dtype: DTypeLike, axes: LogicalAxes = ("embed",), num_axes: int = 1
    ) -> None:
        shape = (shape,) if isinstance(shape, int) else shape
        self.spec = spec
        self.num_axes = num_axes
        self.weight = parameter(shape, axes, dtype, mean=0.0 if spec.unit_offset else 1.0) if spec.gain else None
        self.bias = parameter(shape, axes, dtype) if spec.bias else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        over = tuple(range(-self.num_axes, 0))
        y = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            y -= jnp.mean(y, axis=over, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=over, keepdims=True) + self.spec.eps)
        gain, bias = value(self.weight), value(self.bias)
        if gain is not None:
            y *= gain.astype(jnp.float32) + (1.0 if self.spec.unit_offset else 0.0)
        if bias is not None:
            y += bias.astype(jnp.float32)
        return y.astype(x.dtype)
