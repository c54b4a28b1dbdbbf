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
        y = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            y -= jnp.mean(y, axis=tuple(range(-self.num_axes, 0)), keepdims=True)
        return self.gained(y * self.scale(y)).astype(x.dtype)

    def scale(self, x: Float[Array, "*rows D"]) -> Float[Array, ...]:
        """What makes the mean of each row's squares 1, its normalised axes kept as 1."""
        squares = jnp.square(x.astype(jnp.float32))
        return jax.lax.rsqrt(jnp.mean(squares, axis=tuple(range(-self.num_axes, 0)), keepdims=True) + self.spec.eps)

    def gained(self, y: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The gain and the bias of each dimension applied to normalised rows."""
        gain, bias = value(self.weight), value(self.bias)
        if gain is not None:
            y *= gain.astype(jnp.float32) + (1.0 if self.spec.unit_offset else 0.0)
        return y if bias is None else y + bias.astype(jnp.float32)


def apply_norm(norm: Norm | None, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """x normalised, where there is a norm."""
    return x if norm is None else norm(x)
