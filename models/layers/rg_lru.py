"""Griffin's recurrent block: a convolution and a real-gated linear recurrent unit beside a gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec, StepBatch
from jaxserve.models.layers import recurrence
from jaxserve.models.layers.linear import linear, parameter, weight
from jaxserve.models.layers.mlp import ACTIVATIONS
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.short_conv import short_conv, taps
from jaxserve.models.recurrent_spec import RgLruSpec

CHUNK = 128


class RgLru(nnx.Module):
    """h[t] = a[t] h[t - 1] + sqrt(1 - a[t]^2) i[t] x[t] with a[t] = exp(-8 softplus(rate) r[t]); r and i are gates of x[t].

    W channels in `blocks` of W / blocks; the very first token of a text is not scaled by the root.

    Attributes:
        into: [D, 2, W], the gate beside the unit before its input.
        conv: [K, W].
        gates: [2, blocks, W / blocks, W / blocks], i before r; with their biases.
        rate: [W].
        out: [W, D].
    """

    def __init__(self, d_model: int, spec: RgLruSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        block = spec.width // spec.num_blocks
        self.into = weight((d_model, 2, spec.width), ("embed", None, "ffn"), dtype)
        self.into_bias = parameter((2, spec.width), (None, "ffn"), dtype)
        self.conv = taps((spec.conv_kernel, spec.width), (None, "ffn"), dtype)
        self.conv_bias = parameter((spec.width,), ("ffn",), dtype)
        self.gates = parameter((2, spec.num_blocks, block, block), (None, "heads", None, None), dtype, std=block**-0.5)
        self.gates_bias = parameter((2, spec.num_blocks, block), (None, "heads", None), dtype)
        self.rate = parameter((spec.width,), ("ffn",), jnp.float32)
        self.out = weight((spec.width, d_model), ("ffn", "embed"), dtype)
        self.out_bias = parameter((d_model,), ("embed",), dtype)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        conv_pool, pool = caches
        into = linear(x, self.into.get_value(), self.into_bias.get_value())  # [T, 2, W]
        u, conv_pool = short_conv(into[:, 1], conv_pool, self.conv.get_value(), self.conv_bias.get_value(), batch)
        blocks = u.reshape(u.shape[0], self.spec.num_blocks, -1)
        gates = jnp.einsum(
            "tbw,gbwv->tgbv",
            blocks,
            self.gates.get_value(),
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        gates = jax.nn.sigmoid(gates + self.gates_bias.get_value().astype(jnp.float32)).reshape(x.shape[0], 2, -1)  # [T, 2, W]
        log_decay = -8.0 * jax.nn.softplus(self.rate.get_value()) * gates[:, 1]
        scale = jnp.sqrt(-jnp.expm1(2 * log_decay))
        scale = jnp.where((batch.positions == 0)[:, None], 1.0, scale)
        inputs = (jnp.exp(log_decay), u.astype(jnp.float32) * gates[:, 0] * scale)
        pool, y = recurrence.run(pool, inputs, batch, step=_step, chunk=_chunk, chunk_size=CHUNK)
        y = y.astype(x.dtype) * ACTIVATIONS[self.spec.activation](into[:, 0])
        return linear(y, self.out.get_value(), self.out_bias.get_value()), (conv_pool, pool)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The convolution's last inputs, and the state of every channel."""
        conv = StateSpec((self.spec.conv_kernel - 1, self.spec.width), (None, "ffn"))
        return conv, StateSpec((self.spec.width,), ("ffn",), jnp.float32)


def _step(states: Float[Array, "B W"], inputs: tuple[Array, Array]) -> tuple[Array, Array]:
    decay, added = inputs
    states = states * decay + added
    return states, states


def _chunk(state: Float[Array, " W"], inputs: tuple[Array, Array], valid: Bool[Array, " C"]) -> tuple[Array, Array]:
    decay, added = inputs
    states = recurrence.scan_linear(jnp.where(valid[:, None], decay, 1), jnp.where(valid[:, None], added, 0), state)
    return states[-1], states
