"""RWKV 4's two blocks, which both mix each token with the one before; the first also with all before that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec, StepBatch
from jaxserve.models.layers import recurrence
from jaxserve.models.layers.linear import linear, parameter, weight
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.short_conv import last_inputs
from jaxserve.models.recurrent_spec import ChannelMixSpec, TimeMixSpec

CHUNK = 128
FLOOR = -1e30  # the largest exponent before any token: finite, so that no inf - inf arises


class TimeMix(nnx.Module):
    """y[t] = sigmoid(r[t]) * (sum of exp(k[s] - (t - 1 - s) decay) v[s] over s < t, and exp(k[t] + first) v[t]) / the weights' sum.

    C channels. The sums are kept with their largest exponent taken out.

    Attributes:
        mix: [3, D], how much of the token itself, rather than the one before, goes into k, v and r.
        kvr: [D, 3, C].
        decay: [C], its logarithm.
        first: [C].
        out: [C, D].
    """

    def __init__(self, d_model: int, spec: TimeMixSpec, dtype: DTypeLike) -> None:
        self.d_model, self.dim = d_model, spec.dim
        self.mix = parameter((3, d_model), (None, "embed"), dtype, mean=0.5)
        self.kvr = parameter((3, d_model, spec.dim), (None, "embed", "ffn"), dtype, std=d_model**-0.5)
        self.decay = parameter((spec.dim,), ("ffn",), jnp.float32)
        self.first = parameter((spec.dim,), ("ffn",), jnp.float32)
        self.out = weight((spec.dim, d_model), ("ffn", "embed"), dtype)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        shift_pool, pool = caches
        mixed, shift_pool = _mix(x, shift_pool, self.mix.get_value(), batch)
        k, v, r = (linear(part, w) for part, w in zip(mixed, self.kvr.get_value(), strict=True))
        inputs = (k.astype(jnp.float32), v.astype(jnp.float32))
        pool, y = recurrence.run(pool, inputs, batch, step=self._step, chunk=self._chunk, chunk_size=CHUNK)
        return linear(jax.nn.sigmoid(r) * y.astype(x.dtype), self.out.get_value()), (shift_pool, pool)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The token before; the weighted sum, the sum of the weights and the largest exponent of every channel."""
        return StateSpec((1, self.d_model), (None, None)), StateSpec((3, self.dim), (None, "ffn"), jnp.float32)

    def _step(self, states: Float[Array, "B 3 channels"], inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        k, v = inputs
        total, weights, top = (states[..., i, :] for i in range(3))
        top = jnp.where(weights == 0, FLOOR, top)  # nothing yet
        before = (total, weights, top)
        y, new = self._read(before, k, v), _merge(_later(before, jnp.exp(self.decay.get_value())), (v, jnp.ones_like(k), k))
        return jnp.stack(new, axis=-2), y

    def _chunk(
        self, state: Float[Array, "3 channels"], inputs: tuple[Array, Array], valid: Bool[Array, " C"]
    ) -> tuple[Array, Array]:
        k, v = inputs
        rate = jnp.exp(self.decay.get_value())
        start = (state[0], state[1], jnp.where(state[1] == 0, FLOOR, state[2]))

        def combine(first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[Array, ...]:
            return *_merge(_later(first[:3], second[3]), second[:3]), first[3] + second[3]

        some = valid[:, None]
        tokens = (jnp.where(some, v, 0), jnp.where(some, jnp.ones_like(k), 0), jnp.where(some, k, FLOOR))
        first = _merge(_later(start, rate), tuple(x[0] for x in tokens))
        elements = tuple(x.at[0].set(new) for x, new in zip(tokens, first, strict=True))
        *sums, _ = lax.associative_scan(combine, (*elements, jnp.where(some, rate, 0) * jnp.ones_like(k)))
        before = tuple(jnp.concatenate([x[None], y[:-1]]) for x, y in zip(start, sums, strict=True))
        return jnp.stack([x[-1] for x in sums]), self._read(before, k, v)

    def _read(self, before: tuple[Array, ...], k: Array, v: Array) -> Array:
        total, weights, _ = _merge(before, (v, jnp.ones_like(k), k + self.first.get_value()))
        return total / weights


class ChannelMix(nnx.Module):
    """sigmoid(r) * value(relu(key)^2).

    Attributes:
        mix: [2, D], how much of the token itself, rather than the one before, goes into the key and r.
        key: [D, F].
        receptance: [D, D].
        value: [F, D].
    """

    def __init__(self, d_model: int, spec: ChannelMixSpec, dtype: DTypeLike) -> None:
        self.d_model = d_model
        self.mix = parameter((2, d_model), (None, "embed"), dtype, mean=0.5)
        self.key = weight((d_model, spec.dim), ("embed", "ffn"), dtype)
        self.receptance = weight((d_model, d_model), ("embed", None), dtype)
        self.value = weight((spec.dim, d_model), ("ffn", "embed"), dtype)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        (key, r), pool = _mix(x, caches[0], self.mix.get_value(), batch)
        hidden = jnp.square(jax.nn.relu(linear(key, self.key.get_value())))
        return jax.nn.sigmoid(linear(r, self.receptance.get_value())) * linear(hidden, self.value.get_value()), (pool,)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """The token before."""
        return (StateSpec((1, self.d_model), (None, None)),)


def _mix(x: Float[Array, "T D"], pool: Array, shares: Float[Array, "n D"], batch: StepBatch) -> tuple[list[Array], Array]:
    """For each share, that of the token itself with the rest of the one before; and the pool with this step's last tokens."""
    (before,), pool = last_inputs(x, pool, batch)
    return [x * share + before * (1 - share) for share in shares], pool


def _later(sums: tuple[Array, ...], decay: Array) -> tuple[Array, ...]:
    """Sums whose terms weigh exp(-decay) times what they did."""
    total, weights, top = sums
    return total, weights, top - decay


def _merge(first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[Array, ...]:
    """The sums of both: (weighted sum, sum of weights), both times exp(top)."""
    top = jnp.maximum(first[2], second[2])
    a, b = jnp.exp(first[2] - top), jnp.exp(second[2] - top)
    return first[0] * a + second[0] * b, first[1] * a + second[1] * b, top
