"""LFM2's mixer: a short convolution between two gates. What it keeps is the convolution's last inputs alone."""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec, StepBatch
from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.short_conv import short_conv, taps
from jaxserve.models.recurrent_spec import ShortConvSpec


class GatedConv(nnx.Module):
    """out(c * conv(b * x)), where b, c and x are projections of the input.

    Attributes:
        into: [D, 3, D], b, c and x.
        conv: [K, D].
        out: [D, D].
    """

    def __init__(self, d_model: int, spec: ShortConvSpec, dtype: DTypeLike) -> None:
        self.d_model, self.kernel = d_model, spec.conv_kernel
        self.into = weight((d_model, 3, d_model), ("embed", None, "ffn"), dtype)
        self.into_bias = parameter((3, d_model), (None, "ffn"), dtype) if spec.bias else None
        self.conv = taps((spec.conv_kernel, d_model), (None, "ffn"), dtype)
        self.conv_bias = parameter((d_model,), ("ffn",), dtype) if spec.bias else None
        self.out = weight((d_model, d_model), ("ffn", "embed"), dtype)
        self.out_bias = parameter((d_model,), ("embed",), dtype) if spec.bias else None

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        into = linear(x, self.into.get_value(), value(self.into_bias))  # [T, 3, D]
        y, pool = short_conv(into[:, 0] * into[:, 2], caches[0], self.conv.get_value(), value(self.conv_bias), batch)
        return linear(into[:, 1] * y, self.out.get_value(), value(self.out_bias)), (pool,)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The convolution's last inputs."""
        return (StateSpec((self.kernel - 1, self.d_model), (None, "ffn")),)
