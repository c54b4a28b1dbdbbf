"""RMS and layer normalisation, computed in float32."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import LogicalAxes
from jaxserve.models.layers.linear import parameter, value
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight, have_kernels
from jaxserve.models.spec import NormSpec
from jaxserve.pallas_kernels import quantized_rows


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

    def rounded(self, x: Float[Array, "T D"], readers: Sequence[Array | Fp8Weight]) -> Fp8Rows | None:
        """The same in 8 bits, in one kernel: where there is one, and all weights that read it take such rows."""
        gain = value(self.weight)
        if gain is None or self.bias is not None or self.spec.kind != "rms" or not (readers and have_kernels(readers)):
            return None
        offset = 1.0 if self.spec.unit_offset else 0.0
        rows = quantized_rows.quantize_normed(x, gain, eps=self.spec.eps, offset=offset, implementation=readers[0].rounding)
        return Fp8Rows(*rows, dtype=x.dtype)

    def gain(self) -> Float[Array, ...]:
        """The gain, where there is one."""
        assert self.weight is not None
        return self.weight.get_value()

    def gained(self, y: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The gain and the bias of each dimension applied to normalised rows."""
        gain, bias = value(self.weight), value(self.bias)
        if gain is not None:
            y *= gain.astype(jnp.float32) + (1.0 if self.spec.unit_offset else 0.0)
        return y if bias is None else y + bias.astype(jnp.float32)


def apply_norm(norm: Norm | None, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """x normalised, where there is a norm."""
    return x if norm is None else norm(x)


def apply_norm_for(
    readers: Sequence[Array | Fp8Weight], norm: Norm | None, x: Float[Array, "T D"], normed: Float[Array, "T D"]
) -> Float[Array, "T D"] | Fp8Rows:
    """What some weights read, all of which take it rounded or none: `normed`, which is x normalised, or that in 8 bits."""
    rounded = None if norm is None else norm.rounded(x, readers)
    return normed if rounded is None else rounded
