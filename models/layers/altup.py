"""Several residual streams (AltUp, https://arxiv.org/abs/2301.13310), and LAuReL's way beside a mixer, as Gemma 3n has them."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.layers.linear import linear, linear_by_head, parameter, weight
from jaxserve.models.layers.norms import Norm
from jaxserve.models.spec import AltUpSpec, NormSpec


class Streams(nnx.Module):
    """Makes the streams of the embeddings, and what the logits are made of from the streams.

    Attributes:
        split: [A - 1, D, D]; merge: [A - 1, D, D].
    """

    def __init__(self, d_model: int, spec: AltUpSpec, dtype: DTypeLike) -> None:
        shape, axes = (spec.num_streams - 1, d_model, d_model), (None, None, None)
        self.split = parameter(shape, axes, dtype, std=d_model**-0.5)
        self.merge = parameter(shape, axes, dtype, std=d_model**-0.5)

    def made_of(self, x: Float[Array, "T D"]) -> Float[Array, "T A D"]:
        """x, and its projections as large as x is."""
        w = self.split.get_value()
        others = linear_by_head(jnp.broadcast_to(x[:, None], (x.shape[0], w.shape[0], x.shape[1])), w)
        return jnp.concatenate((x[:, None], _as_large(others, x)), axis=1)

    def merged(self, streams: Float[Array, "S A D"]) -> Float[Array, "S D"]:
        """The mean of the first stream and of the others' projections, as large as the first is."""
        first, others = streams[:, 0], linear_by_head(streams[:, 1:], self.merge.get_value())
        return jnp.mean(jnp.concatenate((first[:, None], _as_large(others, first)), axis=1), axis=1)


def _as_large(others: Float[Array, "T n D"], x: Float[Array, "T D"]) -> Float[Array, "T n D"]:
    wanted = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)[:, None, None]
    got = jnp.mean(jnp.square(others.astype(jnp.float32)), axis=-1, keepdims=True)
    return (others * jnp.sqrt(wanted / jnp.maximum(got, 1e-5))).astype(x.dtype)


class AltUp(nnx.Module):
    """A layer's way with the streams: it predicts them, computes the active one, and corrects the others by how far it was off.

    Attributes:
        router: [D, A].
        prediction: [A, A, A], from the router's values to what each stream takes of which.
        correction: [A, A].
        output_gain: [D].
    """

    def __init__(self, d_model: int, spec: AltUpSpec, norm: NormSpec, dtype: DTypeLike) -> None:
        num = spec.num_streams
        self.spec = spec
        self.router_norm = Norm(d_model, norm, dtype)
        self.router = parameter((d_model, num), ("embed", None), dtype, std=d_model**-0.5)
        self.prediction = parameter((num, num, num), (None, None, None), dtype)
        self.correction = parameter((num, num), (None, None), dtype)
        self.output_gain = parameter((d_model,), ("embed",), dtype, mean=1.0) if spec.scales_output else None

    def predict(self, streams: Float[Array, "T A D"]) -> Float[Array, "T A D"]:
        """The streams behind the layer, as far as they can be told before it."""
        shares = linear(self._route(streams[:, self.spec.active]), self.prediction.get_value())  # [T, A, A]
        return streams + _mix(shares, streams)

    def correct(self, predicted: Float[Array, "T A D"], computed: Float[Array, "T D"]) -> Float[Array, "T A D"]:
        """The streams, given what the layer made of the active one."""
        shares = linear(self._route(computed), self.correction.get_value()) + 1  # [T, A]
        return predicted + shares[..., None] * (computed - predicted[:, self.spec.active])[:, None]

    def output(self, streams: Float[Array, "T A D"]) -> Float[Array, "T D"]:
        """The active stream, for what comes behind."""
        active = streams[:, self.spec.active]
        return active if self.output_gain is None else active * self.output_gain.get_value()

    def _route(self, x: Float[Array, "T D"]) -> Float[Array, "T A"]:
        routed = linear(self.router_norm(x), self.router.get_value(), out_dtype=jnp.float32)
        return jnp.tanh(routed / x.shape[-1]).astype(x.dtype)


def _mix(shares: Float[Array, "T A A"], streams: Float[Array, "T A D"]) -> Float[Array, "T A D"]:
    return jnp.einsum("tij,tjd->tid", shares, streams, precision="highest" if streams.dtype == jnp.float32 else None)


class Laurel(nnx.Module):
    """x + norm(right(left(x))) (https://arxiv.org/abs/2411.07501).

    Attributes:
        left: [D, R]; right: [R, D].
    """

    def __init__(self, d_model: int, rank: int, norm: NormSpec, dtype: DTypeLike) -> None:
        self.left = weight((d_model, rank), ("embed", None), dtype)
        self.right = weight((rank, d_model), (None, "embed"), dtype)
        self.norm = Norm(d_model, norm, dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return x + self.norm(linear(linear(x, self.left.get_value()), self.right.get_value()))
