"""Inputs of each layer's own: made once for all layers, and let into a layer by its gate."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.models.layers.linear import linear, parameter, weight
from jaxserve.models.layers.mlp import ACTIVATIONS
from jaxserve.models.layers.norms import Norm
from jaxserve.models.spec import LayerInputsSpec, NormSpec


class LayerInputs(nnx.Module):
    """(embedding sqrt(P) + norm(projection of the model's embedding)) / sqrt(2), for every layer.

    Attributes:
        embed: [vocabulary of its own, L, P].
        project: [D, L, P].
    """

    def __init__(self, d_model: int, num_layers: int, spec: LayerInputsSpec, norm: NormSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        self.embed = parameter((spec.vocab_size, num_layers, spec.dim), ("vocab", None, None), dtype, std=spec.dim**-0.5)
        self.project = weight((d_model, num_layers, spec.dim), ("embed", None, None), dtype)
        self.norm = Norm(spec.dim, norm, dtype, (None,))

    def __call__(self, token_ids: Int[Array, " T"], x: Float[Array, "T D"]) -> Float[Array, "T L P"]:
        """x: the model's embeddings."""
        spec = self.spec
        ids = jnp.where(token_ids < spec.vocab_size, token_ids, 0)
        own = jnp.take(self.embed.get_value(), ids, axis=0, mode="clip") * jnp.asarray(spec.dim**0.5, x.dtype)
        projected = self.norm(linear(x, self.project.get_value()) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype))
        return (projected + own) * jnp.asarray(2**-0.5, x.dtype)


class LayerInput(nnx.Module):
    """What a layer adds for its own input: norm(out(activation(gate(x)) * input)).

    Attributes:
        gate: [D, P].
        out: [P, D].
    """

    def __init__(self, d_model: int, spec: LayerInputsSpec, norm: NormSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        self.gate = weight((d_model, spec.dim), ("embed", None), dtype)
        self.out = weight((spec.dim, d_model), (None, "embed"), dtype)
        self.norm = Norm(d_model, norm, dtype)

    def __call__(self, x: Float[Array, "T D"], own: Float[Array, "T P"]) -> Float[Array, "T D"]:
        gate = ACTIVATIONS[self.spec.activation](linear(x, self.gate.get_value()))
        return self.norm(linear(gate * own, self.out.get_value()))
