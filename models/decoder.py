"""The one decoder, configured by a DecoderSpec. Knows arrays, not requests; holds zeros until weights are handed in."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StepBatch
from jaxserve.models.layers.linear import linear, parameter
from jaxserve.models.layers.mixer import make_mixer
from jaxserve.models.layers.mlp import Mlp
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.rope import Rotation, rotation
from jaxserve.models.spec import DecoderSpec, LayerSpec, RopeSpec


class DecoderLayer(nnx.Module):
    """A mixer over tokens and an mlp, each adding to the residual stream; either may be missing."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, dtype: DTypeLike) -> None:
        def norm() -> Norm:
            return Norm(spec.d_model, spec.norm, dtype)

        sandwich = spec.norm_placement == "sandwich"
        self.residual_multiplier = spec.residual_multiplier
        if layer.mixer is not None:
            self.mixer_norm = norm()
            self.mixer_out_norm = norm() if sandwich else None
        self.mixer = None if layer.mixer is None else make_mixer(spec.d_model, layer.mixer, dtype)
        if layer.mlp is not None:
            self.mlp_norm = norm()
            self.mlp_out_norm = norm() if sandwich else None
        self.mlp = None if layer.mlp is None else Mlp(spec.d_model, layer.mlp, dtype)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        if self.mixer is not None:
            mixed, caches = self.mixer(self.mixer_norm(x), caches, batch, rotation, runtime)
            x = self._add(x, mixed, self.mixer_out_norm)
        if self.mlp is not None:
            x = self._add(x, self.mlp(self.mlp_norm(x)), self.mlp_out_norm)
        return x, caches

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """What the layer keeps."""
        return () if self.mixer is None else self.mixer.cache_specs()

    def _add(self, x: Array, change: Array, out_norm: Norm | None) -> Array:
        if out_norm is not None:
            change = out_norm(change)
        return x + (change if self.residual_multiplier == 1.0 else change * self.residual_multiplier)


@partial(jax.jit, static_argnames=("graphdef", "runtime"))
def _run_layer(
    graphdef: nnx.GraphDef[DecoderLayer],
    state: Any,
    x: Float[Array, "T D"],
    caches: tuple[Array, ...],
    batch: StepBatch,
    rotation: Rotation | None,
    runtime: Runtime,
) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
    """Traced and lowered once for all layers alike; XLA inlines the calls, so that nothing is left of them at run time."""
    return nnx.merge(graphdef, state)(x, caches, batch, rotation, runtime)


class Decoder(nnx.Module):
    """Token ids in, logits of the wanted rows out.

    Attributes:
        embed: [V, D].
        lm_head: [D, V]; None where the embeddings are tied.
    """

    def __init__(self, spec: DecoderSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        self.embed = parameter((spec.vocab_size, spec.d_model), ("vocab", "embed"), dtype, std=spec.d_model**-0.5)
        self.layers = nnx.List([DecoderLayer(spec, layer, dtype) for layer in spec.layers])
        self.final_norm = Norm(spec.d_model, spec.norm, dtype)
        head = (spec.d_model, spec.vocab_size)  # never quantised: the logits are worth their bits
        self.lm_head = None if spec.tie_embeddings else parameter(head, ("embed", "vocab"), dtype, std=spec.d_model**-0.5)

    def __call__(
        self, batch: StepBatch, caches: tuple[Array, ...], runtime: Runtime
    ) -> tuple[Float[Array, "S V"], tuple[Array, ...]]:
        """Runs the step's tokens through every layer.

        Args:
            caches: one for each of cache_specs(), in its order.

        Returns:
            float32 logits of batch.logit_rows, and the caches with this step's tokens.
        """
        x = self._embed(batch)
        rotations = self._rotations(batch)
        remaining, new_caches = iter(caches), []
        for layer, layer_spec in zip(self.layers, self.spec.layers, strict=True):
            own = tuple(islice(remaining, len(layer.cache_specs())))
            x, own = _run_layer(*nnx.split(layer), x, own, batch, rotations[layer_spec.rope], runtime)
            new_caches += own
        return self._logits(jnp.take(x, batch.logit_rows, axis=0, mode="clip")), tuple(new_caches)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """What the layers keep."""
        return tuple(spec for layer in self.layers for spec in layer.cache_specs())

    def _embed(self, batch: StepBatch) -> Float[Array, "T D"]:
        x = jnp.take(self.embed.get_value(), batch.token_ids, axis=0, mode="clip")
        return x if self.spec.embed_scale is None else x * jnp.asarray(self.spec.embed_scale, x.dtype)

    def _rotations(self, batch: StepBatch) -> dict[RopeSpec | None, Rotation | None]:
        """The angles of each rope that some layer has, made once for all of them."""
        ropes = dict.fromkeys(layer.rope for layer in self.spec.layers)  # in the layers' order: same program every time
        return {rope: None if rope is None else rotation(rope, batch.positions) for rope in ropes}

    def _logits(self, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
        x = self.final_norm(x)
        if self.lm_head is None:
            logits = linear(x, self.embed.get_value(), transpose=True, out_dtype=jnp.float32)
        else:
            logits = linear(x, self.lm_head.get_value(), out_dtype=jnp.float32)
        if self.spec.logit_multiplier != 1.0:
            logits *= self.spec.logit_multiplier
        if self.spec.logit_softcap is not None:
            logits = self.spec.logit_softcap * jnp.tanh(logits / self.spec.logit_softcap)
        return logits


def abstract_decoder(spec: DecoderSpec, dtype: DTypeLike) -> Decoder:
    """The decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(spec, dtype))
