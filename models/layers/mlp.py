"""The feed-forward block: gated or plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers.linear import linear, linear_of_parts, parameter, value, weight
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight, gated_fp8, have_kernels
from jaxserve.models.spec import Activation, MlpSpec

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
IN_KERNELS = ("silu", "gelu_tanh", "gelu_quick")  # what Mosaic can compile


def activate(spec: MlpSpec, up: Float[Array, "T parts F"], xielu: Float[Array, " 4"] | None = None) -> Float[Array, "T F"]:
    """What goes into the last projection, from the first one's result.

    Args:
        up: gate and up of a gated block; up alone of a plain one.
        xielu: that activation's learned numbers.
    """
    if spec.clamped is not None:
        gate, linear_part = jnp.minimum(up[:, 0], spec.clamped.limit), jnp.clip(up[:, 1], -spec.clamped.limit, spec.clamped.limit)
        return gate * jax.nn.sigmoid(spec.clamped.alpha * gate) * (linear_part + 1)
    gate = up[:, 0] if spec.gate_multiplier == 1.0 else up[:, 0] * spec.gate_multiplier
    if spec.sparsity:
        gate = _largest(gate, spec.sparsity)
    hidden = _xielu(gate, xielu) if xielu is not None else ACTIVATIONS[spec.activation](gate)
    return hidden * up[:, 1] if spec.gated else hidden


def _largest(x: Float[Array, "T F"], sparsity: float) -> Float[Array, "T F"]:
    """How far each value is above the quantile that x would have if it were normally distributed; 0 for those below."""
    wide = x.astype(jnp.float32)
    cutoff = jnp.mean(wide, -1, keepdims=True) + jnp.std(wide, -1, keepdims=True) * NormalDist().inv_cdf(sparsity)
    return jax.nn.relu(wide - cutoff).astype(x.dtype)


def _xielu(x: Array, numbers: Float[Array, " 4"]) -> Array:
    """xIELU (https://arxiv.org/abs/2411.13010) with alpha_p, alpha_n, beta and eps."""
    alpha_p, alpha_n, beta, eps = (numbers[i].astype(x.dtype) for i in range(4))
    alpha_p, alpha_n = jax.nn.softplus(alpha_p), beta + jax.nn.softplus(alpha_n)
    negative = (jnp.expm1(jnp.minimum(x, eps)) - x) * alpha_n
    return jnp.where(x > 0, alpha_p * x * x, negative) + beta * x


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))).

    Attributes:
        up: [D, 2, F], gate before up, so that cutting F cuts both alike; [D, 1, F] if not gated.
        down: [F, D].
        xielu: the activation's alpha_p, alpha_n, beta and eps.
    """

    def __init__(self, d_model: int, spec: MlpSpec, dtype: DTypeLike) -> None:
        parts = 2 if spec.gated else 1
        self.spec = spec
        self.up = weight((d_model, parts, spec.dim), ("embed", None, "ffn"), dtype)
        self.up_bias = parameter((parts, spec.dim), (None, "ffn"), dtype) if spec.bias else None
        self.xielu = parameter((4,), (None,), dtype, mean=0.5) if spec.activation == "xielu" else None
        self.hidden_norm = Norm(spec.dim, spec.hidden_norm, dtype, ("ffn",)) if spec.hidden_norm else None
        self.down = weight((spec.dim, d_model), ("ffn", "embed"), dtype)
        self.down_bias = parameter((d_model,), ("embed",), dtype) if spec.bias else None

    def __call__(self, x: Float[Array, "T D"] | Fp8Rows, batch: StepBatch, runtime: Runtime) -> Float[Array, "T D"]:
        out = linear_of_parts(self.hidden(x), self.down.get_value(), value(self.down_bias), batch=batch, runtime=runtime)
        return out if self.spec.out_multiplier == 1.0 else out * self.spec.out_multiplier

    def readers(self) -> tuple[Array | Fp8Weight, ...]:
        """The weights that x meets."""
        return (self.up.get_value(),)

    @property
    def ends_in_product(self) -> bool:
        """Whether nothing happens to the last product."""
        return self.down_bias is None and self.spec.out_multiplier == 1.0

    def hidden(self, x: Float[Array, "T D"] | Fp8Rows) -> Float[Array, "T F"] | Fp8Rows:
        """What the last projection reads."""
        spec, weights = self.spec, (self.up.get_value(), self.down.get_value())
        is_plain = spec.gated and not (spec.bias or spec.clamped or spec.sparsity or spec.hidden_norm)
        if is_plain and spec.activation in IN_KERNELS and spec.gate_multiplier == 1.0 and have_kernels(weights):
            return gated_fp8(x, weights[0], ACTIVATIONS[spec.activation])
        up = linear(x, weights[0], value(self.up_bias))  # [T, 2 or 1, F]
        hidden = activate(spec, up, value(self.xielu))
        return hidden if self.hidden_norm is None else self.hidden_norm(hidden)
