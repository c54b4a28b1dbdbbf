"""The one decoder, configured by a DecoderSpec. Knows arrays, not requests; holds zeros until weights are handed in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models import late_sums
from jaxserve.models.cache_layout import CacheLayout, CachePlace, one_table, table_of
from jaxserve.models.interface import MODEL_AXIS, AnyCacheSpec, Runtime, StepBatch
from jaxserve.models.layers.altup import AltUp, Laurel, Streams
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.layer_inputs import LayerInput, LayerInputs
from jaxserve.models.layers.linear import OutputsFirst, linear, parameter, value, weight
from jaxserve.models.layers.mixer import make_mixer
from jaxserve.models.layers.mlp import Mlp
from jaxserve.models.layers.moe import Moe
from jaxserve.models.layers.norms import Norm, apply_norm, apply_norm_for
from jaxserve.models.layers.positions import sinusoids
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight
from jaxserve.models.layers.rope import Rotation, rotation
from jaxserve.models.layers.rwkv import ChannelMix
from jaxserve.models.layers.shared_block import SharedBlock, SharedUse
from jaxserve.models.layers.unsummed import Unadded, added
from jaxserve.models.recurrent_spec import ChannelMixSpec
from jaxserve.models.spec import BorrowingAttentionSpec, DecoderSpec, LayerSpec, MlpSpec, MoeSpec, RopeSpec, Shares


class DecoderLayer(nnx.Module):
    """A mixer over tokens and an mlp, each adding to the residual stream; either may be missing."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, dtype: DTypeLike) -> None:
        def norm(is_there: bool) -> Norm | None:
            return Norm(spec.d_model, spec.norm, dtype) if is_there else None

        place = layer.norm_placement or spec.norm_placement
        before, behind = place not in ("post", "after"), place in ("post", "sandwich", "after")
        mixes, feeds, gains = layer.mixer is not None, layer.mlp is not None, spec.residual_gain
        # What layers share: equal for layers alike, which are then traced once.
        self.spec = replace(spec, layers=(), norm_placement=place)
        self.mixer_norm = norm(before and mixes)
        self.mixer = None if layer.mixer is None else make_mixer(spec.d_model, layer.mixer, dtype)
        self.mixer_out_norm = norm(behind and mixes)
        has_norms = isinstance(layer.mlp, MoeSpec) and layer.mlp.norms is not None
        self.mlp_norm = norm(before and feeds and place != "parallel_shared" and not has_norms)
        self.mlp = None if layer.mlp is None else _make_mlp(spec.d_model, layer.mlp, dtype)
        self.mlp_out_norm = norm(behind and feeds)
        self.shortcut = None if layer.shortcut is None else Moe(spec.d_model, layer.shortcut, dtype)
        self.shared_use = None if layer.shared is None else SharedUse(spec.d_model, layer.shared, dtype)
        self.mixer_shares, self.mlp_shares = layer.mixer_shares, layer.mlp_shares
        self.mixer_gain = parameter((spec.d_model,), ("embed",), dtype, mean=1.0) if gains and mixes else None
        self.mlp_gain = parameter((spec.d_model,), ("embed",), dtype, mean=1.0) if gains and feeds else None
        self.gain = parameter((1,), (None,), dtype, mean=1.0) if spec.layer_gain else None
        inputs, rank = spec.layer_inputs, spec.laurel_rank
        self.laurel = None if rank is None else Laurel(spec.d_model, rank, spec.norm, dtype)
        self.input = None if inputs is None else LayerInput(spec.d_model, inputs, spec.norm, dtype)
        self.altup = None if spec.altup is None else AltUp(spec.d_model, spec.altup, spec.norm, dtype)

    def __call__(
        self,
        x: Float[Array, "T ..."] | Unadded,
        caches: tuple[Array, ...],
        batch: StepBatch,
        rotation: Rotation | None,
        runtime: Runtime,
        shared: tuple[SharedBlock, Array] | None = None,
        own_input: Float[Array, "T P"] | None = None,
    ) -> tuple[Float[Array, "T ..."] | Unadded, tuple[Array, ...]]:
        """What leaves the layer, and the caches with this step's tokens.

        Args:
            x: [T, D]; or the streams [T, A, D]; or [T, 2, D] with what the shortcut of the layer before gives beside it.
            shared: the block that the layer goes through beside its mixer, and the embeddings, for it.
        """
        if runtime.norms_sums and late_sums.serves(self):
            return late_sums.run(self, x, caches, batch, rotation, runtime)
        x = added(x, batch, runtime)
        if self.altup is None:
            x, late = (x, None) if x.ndim == 2 else (x[:, 0], x[:, 1])
            x, caches = self._compute(x, caches, batch, rotation, runtime, shared)
            x = x if late is None else x + late
            if self.input is not None and own_input is not None:
                x += self.input(x, own_input)
            return x if self.gain is None else x * self.gain.get_value(), caches
        streams = self.altup.predict(x)
        x, caches = self._compute(streams[:, self.altup.spec.active], caches, batch, rotation, runtime, shared)
        streams = self.altup.correct(streams, x)
        if self.input is not None and own_input is not None:
            streams = streams.at[:, 1:].add(self.input(self.altup.output(streams), own_input)[:, None])
        return streams, caches

    def _compute(
        self,
        x: Float[Array, "T D"],
        caches: tuple[Array, ...],
        batch: StepBatch,
        rotation: Rotation | None,
        runtime: Runtime,
        shared: tuple[SharedBlock, Array] | None,
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """The mixer and the mlp, and the shortcut's experts if there are any."""
        if self.spec.norm_placement.startswith("parallel"):
            return self._parallel(x, caches, batch, rotation, runtime)
        new_caches: tuple[Array, ...] = ()
        if self.mixer is not None:
            mixed_in = x
            if self.shared_use is not None:
                assert shared is not None
                added, new_caches = self.shared_use(shared[0], x, shared[1], caches[:1], batch, rotation, runtime)
                mixed_in, caches = x + added, caches[1:]
            count = len(caches) - len(self._mlp_cache_specs())
            normed = apply_norm(self.mixer_norm, mixed_in)
            mixer_in = apply_norm_for(_readers(self.mixer), self.mixer_norm, mixed_in, normed)
            mixed, mixer_caches = self.mixer(mixer_in, caches[:count], batch, rotation, runtime)
            new_caches, caches = new_caches + mixer_caches, caches[count:]
            x = self._residual(x, normed, self.mixer_shares)
            x = self._add(x, mixed * self.mixer_shares.added, self.mixer_out_norm, self.mixer_gain)
            if self.laurel is not None:
                x = (x + self.laurel(normed)) * jnp.asarray(2**-0.5, x.dtype)
        if self.mlp is not None:
            normed = apply_norm(self.mlp_norm, x)
            if isinstance(self.mlp, ChannelMix):
                change, caches = self.mlp(normed, caches, batch)
            else:
                change = self._mlp(apply_norm_for(_readers(self.mlp), self.mlp_norm, x, normed), batch, runtime)
            x = self._residual(x, normed, self.mlp_shares)
            x = self._add(x, change * self.mlp_shares.added, self.mlp_out_norm, self.mlp_gain)
            if self.shortcut is not None:
                x = jnp.stack((x, self.shortcut(normed, batch, runtime)), axis=1)
        return x, new_caches + caches

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """What the layer keeps."""
        mixer = () if self.mixer is None else self.mixer.cache_specs()
        if self.shared_use is not None:
            mixer = self.shared_use.cache_specs() + mixer
        return mixer + self._mlp_cache_specs()

    def _mlp_cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        return self.mlp.cache_specs() if isinstance(self.mlp, ChannelMix) else ()

    def _residual(self, x: Array, normed: Array, shares: Shares) -> Array:
        return (normed if self.spec.residual_from_norm else x) * shares.kept

    def _parallel(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        assert self.mixer is not None and self.mlp is not None
        normed = apply_norm(self.mixer_norm, x)
        mixed, caches = self.mixer(normed, caches, batch, rotation, runtime)
        mlp_in = normed if self.mlp_norm is None else self.mlp_norm(x)
        return x + (mixed + self._mlp(mlp_in, batch, runtime)) * self.spec.residual_multiplier, caches

    def _mlp(self, x: Array | Fp8Rows, batch: StepBatch, runtime: Runtime) -> Array:
        assert self.mlp is not None and not isinstance(self.mlp, ChannelMix)
        if isinstance(self.mlp, Moe):
            assert not isinstance(x, Fp8Rows)
            return self.mlp(x, batch, runtime)
        return self.mlp(x, batch, runtime)

    def _add(self, x: Array, change: Array, out_norm: Norm | None, gain: nnx.Param[Array] | None) -> Array:
        if gain is not None:
            x *= gain.get_value()
        is_after = self.spec.norm_placement == "after"
        if out_norm is not None and not is_after:
            change = out_norm(change)
        if self.spec.residual_multiplier != 1.0:
            change *= self.spec.residual_multiplier
        return out_norm(x + change) if out_norm is not None and is_after else x + change


def _readers(block: Any) -> tuple[Array | Fp8Weight, ...]:
    """All weights that read a block's input, where nothing else does."""
    return block.readers() if type(block) in (Attention, Mlp) else ()


def _make_mlp(d_model: int, spec: MlpSpec | MoeSpec | ChannelMixSpec, dtype: DTypeLike) -> Mlp | Moe | ChannelMix:
    if isinstance(spec, ChannelMixSpec):
        return ChannelMix(d_model, spec, dtype)
    return Moe(d_model, spec, dtype) if isinstance(spec, MoeSpec) else Mlp(d_model, spec, dtype)


@partial(jax.jit, static_argnames=("graphdef", "runtime", "shared_graphdef"))
def _run_layer(
    graphdef: nnx.GraphDef[DecoderLayer],
    state: Any,
    x: Float[Array, "T ..."] | Unadded,
    caches: tuple[Array, ...],
    batch: StepBatch,
    rotation: Rotation | None,
    runtime: Runtime,
    shared_graphdef: nnx.GraphDef[SharedBlock] | None = None,
    shared_state: Any = None,
    embedded: Float[Array, "T D"] | None = None,
    *,
    own_input: Float[Array, "T P"] | None = None,
) -> tuple[Float[Array, "T ..."] | Unadded, tuple[Array, ...]]:
    """Traced and lowered once for all layers alike; XLA inlines the calls, so that nothing is left of them at run time."""
    layer = nnx.merge(graphdef, state)
    if shared_graphdef is None or embedded is None:
        return layer(x, caches, batch, rotation, runtime, own_input=own_input)
    return layer(x, caches, batch, rotation, runtime, (nnx.merge(shared_graphdef, shared_state), embedded))


class Decoder(nnx.Module):
    """Token ids in, logits of the wanted rows out.

    Attributes:
        embed: [V, E]; E is D, but where projections lead from it to D and back.
        positions: [P, D].
        lm_head: [E, V]; None where the embeddings are tied.
    """

    def __init__(self, spec: DecoderSpec, dtype: DTypeLike) -> None:
        self.spec = spec
        width, d_model = spec.embed_dim or spec.d_model, spec.d_model
        self.embed = parameter((spec.vocab_size, width), ("vocab", "embed"), dtype, std=d_model**-0.5)
        self.embed_in = weight((width, d_model), (None, "embed"), dtype) if spec.embed_dim else None
        self.embed_norm = Norm(d_model, spec.embed_norm, dtype) if spec.embed_norm else None
        at = spec.positions
        is_learned = at is not None and at.kind == "learned"
        self.positions = parameter((at.count + at.offset, d_model), (None, "embed"), dtype) if at and is_learned else None
        inputs = spec.layer_inputs
        self.inputs = None if inputs is None else LayerInputs(d_model, len(spec.layers), inputs, spec.norm, dtype)
        self.streams = None if spec.altup is None else Streams(d_model, spec.altup, dtype)
        self.layers = nnx.List([DecoderLayer(spec, layer, dtype) for layer in spec.layers])
        shared = {layer.shared.block: layer.shared for layer in spec.layers if layer.shared is not None}
        self.shared = nnx.List([SharedBlock(d_model, shared[block], spec.norm, dtype) for block in range(len(shared))])
        final = replace(spec.norm, eps=spec.final_norm_eps or spec.norm.eps)
        self.final_norm = Norm(d_model, final, dtype) if spec.final_norm else None
        self.embed_out = weight((d_model, width), ("embed", None), dtype) if spec.embed_dim else None
        head = (width, spec.vocab_size)  # never quantised: the logits are worth their bits
        self.lm_head = None if spec.tie_embeddings else parameter(head, ("embed", "vocab"), dtype, std=width**-0.5, inputs=1)
        self.head_bias = parameter((spec.vocab_size,), ("vocab",), dtype) if spec.head_bias else None

    def __call__(
        self, batch: StepBatch, caches: tuple[Array, ...], runtime: Runtime
    ) -> tuple[Float[Array, "S V"], tuple[Array, ...]]:
        """Runs the step's tokens through every layer.

        Args:
            caches: the arrays of runtime.layout; where there is none, one for each of cache_specs(), in its order.

        Returns:
            float32 logits of batch.logit_rows, and the caches with this step's tokens.
        """
        embedded = self._embed(batch, runtime)
        x: Any = embedded
        rotations = self._rotations(batch)
        layout = runtime.layout or one_table(self.cache_specs())
        inputs = None if self.inputs is None else self.inputs(batch.token_ids, embedded)
        if self.streams is not None:
            x = self.streams.made_of(x)
        arrays = list(caches)
        for i, (layer, layer_spec, places) in enumerate(zip(self.layers, self.spec.layers, self._places(layout), strict=True)):
            own = tuple(arrays[place.array] for place in places)
            shared = () if layer_spec.shared is None else (*nnx.split(self.shared[layer_spec.shared.block]), embedded)
            layer_batch = batch.with_table(table_of(places))
            own_input = None if inputs is None else inputs[:, i]
            common = (*nnx.split(layer), x, own, layer_batch, rotations[layer_spec.rope], runtime)
            x, own = _run_layer(*common, *shared, own_input=own_input)
            for place, cache in zip(places, own, strict=True):
                arrays[place.array] = cache
        x = jnp.take(added(x, batch, runtime), batch.logit_rows, axis=0, mode="clip")
        return self._logits(x if self.streams is None else self.streams.merged(x), batch, runtime), tuple(arrays)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """What the layers keep."""
        return tuple(spec for layer in self.layers for spec in layer.cache_specs())

    def _places(self, layout: CacheLayout) -> list[tuple[CachePlace, ...]]:
        """Where each layer's caches are: its own, or those of the layer whose keys and values it reads."""
        remaining, places = iter(layout.places), list[tuple[CachePlace, ...]]()
        for layer, spec in zip(self.layers, self.spec.layers, strict=True):
            own = tuple(islice(remaining, len(layer.cache_specs())))
            places.append(places[spec.mixer.kv_from] if isinstance(spec.mixer, BorrowingAttentionSpec) else own)
        return places

    def _embed(self, batch: StepBatch, runtime: Runtime) -> Float[Array, "T D"]:
        spec = self.spec
        x = runtime.look_up(self.embed.get_value(), batch)
        if spec.embed_scale is not None:
            x *= jnp.asarray(spec.embed_scale, x.dtype)
        if self.embed_in is not None:
            x = linear(x, self.embed_in.get_value())
        if spec.positions is not None:
            at = batch.positions + spec.positions.offset
            table = value(self.positions)
            x += sinusoids(at, spec.d_model).astype(x.dtype) if table is None else jnp.take(table, at, axis=0, mode="clip")
        return x if self.embed_norm is None else self.embed_norm(x)

    def _rotations(self, batch: StepBatch) -> dict[RopeSpec | None, Rotation | None]:
        """The angles of each rope that some layer has, made once for all of them."""
        ropes = dict.fromkeys(layer.rope for layer in self.spec.layers)  # in the layers' order: same program every time
        return {rope: None if rope is None else rotation(rope, batch.positions) for rope in ropes}

    def _logits(self, x: Float[Array, "S D"], batch: StepBatch, runtime: Runtime) -> Float[Array, "S V"]:
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.embed_out is not None:
            x = linear(x, self.embed_out.get_value())
        is_tied = self.lm_head is None
        head: Array | OutputsFirst | None = self.embed.get_value() if is_tied else value(self.lm_head)
        if is_tied and runtime.platform == "cpu":
            head = OutputsFirst(self.embed.get_value())
        by_rows = isinstance(head, OutputsFirst)
        bias = None if self.head_bias is None else self.head_bias.get_value().astype(jnp.float32)
        multiply = partial(linear, transpose=is_tied and not by_rows, out_dtype=jnp.float32)
        cut = P(MODEL_AXIS) if is_tied or by_rows else P(None, MODEL_AXIS)
        logits = runtime.gather_columns(multiply, x, head, bias, cut, self.spec.vocab_size, batch)
        if self.spec.logit_multiplier != 1.0:
            logits *= self.spec.logit_multiplier
        if self.spec.logit_softcap is not None:
            logits = self.spec.logit_softcap * jnp.tanh(logits / self.spec.logit_softcap)
        return logits


def abstract_decoder(spec: DecoderSpec, dtype: DTypeLike) -> Decoder:
    """The decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(spec, dtype))
