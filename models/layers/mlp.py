"""The feed-forward block: gated or plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.layers.linear import linear, parameter, value, weight
from jaxserve.models.spec import Activation, MlpSpec

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))).

    Attributes:
        up: [D, 2, F], gate before up, so that cutting F cuts both alike; [D, 1, F] if not gated.
        down: [F, D].
    """

    def __init__(self, d_model: int, spec: MlpSpec, dtype: DTypeLike) -> None:
        parts = 2 if spec.gated else 1
        self.spec = spec
        self.up = weight((d_model, parts, spec.dim), ("embed", None, "ffn"), dtype)
        self.up_bias = parameter((parts, spec.dim), (None, "ffn"), dtype) if spec.bias else None
        self.down = weight((spec.dim, d_model), ("ffn", "embed"), dtype)
        self.down_bias = parameter((d_model,), ("embed",), dtype) if spec.bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        up = linear(x, self.up.get_value(), value(self.up_bias))  # [T, 2 or 1, F]
        hidden = ACTIVATIONS[self.spec.activation](up[:, 0])
        if self.spec.gated:
            hidden *= up[:, 1]
        return linear(hidden, self.down.get_value(), value(self.down_bias))
