"""DecoderSpec: an architecture as data. Families make it from a Hugging Face config; the one decoder is built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxserve.errors import ConfigError
from jaxserve.models.attention_spec import (
    AttentionSpec,
    BorrowingAttentionSpec,
    DifferentialAttentionSpec,
    MlaSpec,
    NarrowValueAttentionSpec,
    TemperatureSpec,
    ValueLogitAttentionSpec,
)
from jaxserve.models.mlp_spec import Activation, ClampedSwiglu, MlpSpec, MoeSpec, RouterSpec
from jaxserve.models.norm_spec import NormSpec
from jaxserve.models.recurrent_spec import ChannelMixSpec, RecurrentSpec
from jaxserve.models.rope_spec import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)
from jaxserve.models.stream_spec import AltUpSpec, LayerInputsSpec

__all__ = [
    "Activation",
    "AltUpSpec",
    "AttentionSpec",
    "BorrowingAttentionSpec",
    "Branch",
    "ClampedSwiglu",
    "DecoderSpec",
    "DifferentialAttentionSpec",
    "FactorScaling",
    "LayerInputsSpec",
    "LayerSpec",
    "LinearScaling",
    "Llama3Scaling",
    "MixerSpec",
    "MlaSpec",
    "MlpSpec",
    "MoeSpec",
    "NarrowValueAttentionSpec",
    "NormPlacement",
    "NormSpec",
    "ParallelSpec",
    "PositionSpec",
    "RopeScaling",
    "RopeSpec",
    "RouterSpec",
    "SharedSpec",
    "Shares",
    "TemperatureSpec",
    "ValueLogitAttentionSpec",
    "YarnScaling",
]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One of several mixers side by side; factors on what goes in and what comes out."""

    mixer: AttentionSpec | RecurrentSpec
    in_multiplier: float = 1.0
    out_multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """Several mixers side by side, whose outputs are added (Falcon-H1)."""

    branches: tuple[Branch, ...]


MixerSpec = AttentionSpec | MlaSpec | RecurrentSpec | ParallelSpec
"""Everything that can mix tokens."""

NormPlacement = Literal["pre", "sandwich", "post", "after", "parallel", "parallel_shared"]


@dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """A transformer block that several layers go through, whose output is added to what goes into their mixer (Zamba 2).

    Attributes:
        block: layers with the same number share weights.
        rank: of each layer's own changes of these weights.
        adapts_attention: they change q, k and v too, not the feed-forward block alone.
    """

    block: int
    attention: AttentionSpec
    mlp: MlpSpec
    rank: int
    adapts_attention: bool


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Factors on the residual stream and on what is added to it (MiniMax)."""

    kept: float = 1.0
    added: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: a mixer over tokens, then an mlp over each of them. Either may be missing.

    Attributes:
        norm_placement: where it is not the model's (OLMo Hybrid).
        shortcut: experts that see what the mlp sees, and whose output comes in behind the next layer (LongCat).
    """

    mixer: MixerSpec | None
    mlp: MlpSpec | MoeSpec | ChannelMixSpec | None
    shared: SharedSpec | None = None
    mixer_shares: Shares = Shares()
    mlp_shares: Shares = Shares()
    norm_placement: NormPlacement | None = None
    shortcut: MoeSpec | None = None

    @property
    def experts(self) -> MoeSpec | None:
        """Its experts, wherever they are."""
        return self.mlp if isinstance(self.mlp, MoeSpec) else self.shortcut

    @property
    def mixers(self) -> tuple[AttentionSpec | MlaSpec | RecurrentSpec, ...]:
        """All its mixers: one, several side by side, or none."""
        if isinstance(self.mixer, ParallelSpec):
            return tuple(branch.mixer for branch in self.mixer.branches)
        return () if self.mixer is None else (self.mixer,)

    @property
    def attention(self) -> AttentionSpec | None:
        """The attention among its mixers."""
        return next((mixer for mixer in self.mixers if isinstance(mixer, AttentionSpec)), None)

    @property
    def rope(self) -> RopeSpec | None:
        if self.shared is not None:
            return self.shared.attention.rope
        return next((mixer.rope for mixer in self.mixers if isinstance(mixer, AttentionSpec | MlaSpec)), None)


@dataclass(frozen=True, kw_only=True)
class PositionSpec:
    """Position embeddings added to the token embeddings.

    Attributes:
        kind: learned, or sines then cosines of geometric wavelengths up to 2 pi * 10,000 (fairseq's).
        count: positions that there are.
        offset: added to the position before the look-up.
    """

    kind: Literal["learned", "sinusoidal"]
    count: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only language model.

    Attributes:
        norm: of every norm in and after the layers, those within a mixer apart.
        norm_placement: "pre" normalises what goes into mixer and mlp; "post" what comes out; "sandwich" both; "after" the
            residual stream once each is added. "parallel": mixer and mlp both start from the layer's input, each with a
            norm of its own; "parallel_shared": with one norm for both.
        final_norm: there is a norm before the output projection.
        final_norm_eps: of that norm, where it is not the others'.
        embed_norm: of the embeddings.
        embed_scale: factor on the embeddings, rounded to their dtype as checkpoints were trained with.
        embed_dim: of the token embeddings, where projections lead from it to d_model and back (OPT).
        positions: added to the embeddings.
        tie_embeddings: the output projection is the embedding table.
        head_bias: a bias on the logits.
        residual_multiplier: factor on what mixer and mlp add to the residual stream.
        residual_from_norm: mixer and mlp add to what the norm before them gave, not to what went into it.
        residual_gain: the residual stream is multiplied by a weight of its own before each addition (Doge).
        layer_gain: what leaves a layer is multiplied by a number of its own (Gemma 4).
        layer_inputs: layers have inputs of their own.
        altup: there are several residual streams.
        laurel_rank: of the low-rank way beside the mixer (LAuReL, https://arxiv.org/abs/2411.07501).
        logit_multiplier: factor on the logits.
        logit_softcap: logits become softcap * tanh(logits / softcap), after the multiplier.
        max_position: longest context that the model is made for, in tokens.
    """

    vocab_size: int
    d_model: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True
    final_norm_eps: float | None = None
    embed_norm: NormSpec | None = None
    embed_scale: float | None = None
    embed_dim: int | None = None
    positions: PositionSpec | None = None
    tie_embeddings: bool = False
    head_bias: bool = False
    residual_multiplier: float = 1.0
    residual_from_norm: bool = False
    residual_gain: bool = False
    layer_gain: bool = False
    layer_inputs: LayerInputsSpec | None = None
    altup: AltUpSpec | None = None
    laurel_rank: int | None = None
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    max_position: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "max_position", "embed_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mixer, BorrowingAttentionSpec):
                self._check_borrowing(i, layer.mixer)
            if layer.shortcut is not None:
                self._check_shortcut(i, layer)
        if self.laurel_rank is not None and self.norm_placement.startswith("parallel"):
            raise ValueError("LAuReL stands beside a mixer that the mlp comes behind")

    def _check_shortcut(self, i: int, layer: LayerSpec) -> None:
        is_serial = not (layer.norm_placement or self.norm_placement).startswith("parallel")
        behind = self.layers[i + 1] if i + 1 < len(self.layers) else None
        is_plain = self.altup is None and self.layer_inputs is None and not self.layer_gain
        if layer.mlp is None or not is_serial or not is_plain or behind is None or behind.shortcut is not None:
            raise ValueError(f"the shortcut of layer {i} needs an mlp behind the mixer, and a layer behind it that has none")

    def _check_borrowing(self, i: int, reader: BorrowingAttentionSpec) -> None:
        """Pages that a window has passed are gone, so who reads them must see as far back as the layer that keeps them."""
        kept = self.layers[reader.kv_from].mixer if 0 <= reader.kv_from < i else None
        if type(kept) is not AttentionSpec or _kept(kept) != _kept(reader):
            raise ValueError(f"layer {i} cannot read the keys and values of layer {reader.kv_from}: {kept}")

    def for_context(self, length: int | None) -> DecoderSpec:
        """This model for texts of up to `length` tokens; of its first context if that is not given.

        With LongRoPE every key depends on which factors are taken, so one choice holds for all texts.
        """
        firsts = [layer.rope.first_context for layer in self.layers if layer.rope is not None]
        first = min((context for context in firsts if context is not None), default=self.max_position)
        if length is None or length <= first:
            return replace(self, max_position=min(first, self.max_position))
        return replace(self, layers=tuple(map(_for_longer_context, self.layers)))

    def with_kv_repeat(self, repeat: Callable[[int], int]) -> DecoderSpec:
        """This model with each kv head held several times, for more devices than kv heads.

        Args:
            repeat: how often, from the number of kv heads that a layer's checkpoint has.

        Raises:
            ConfigError: if the query heads of a kv head do not divide among its repeats, or heads with one latent not at all.
        """

        def repeated(mixer: Any) -> Any:
            if isinstance(mixer, ParallelSpec):
                return replace(mixer, branches=tuple(replace(b, mixer=repeated(b.mixer)) for b in mixer.branches))
            if isinstance(mixer, MlaSpec) and repeat(mixer.num_heads) != 1:
                raise ConfigError(
                    f"the model's {mixer.num_heads} heads are fewer than the devices. Lower --tensor-parallel-size."
                )
            return mixer.repeated(repeat(mixer.num_kv_heads)) if isinstance(mixer, AttentionSpec) else mixer

        def repeated_layer(layer: LayerSpec) -> LayerSpec:
            shared = layer.shared and replace(layer.shared, attention=repeated(layer.shared.attention))
            return replace(layer, mixer=repeated(layer.mixer), shared=shared)

        return replace(self, layers=tuple(map(repeated_layer, self.layers)))


def _kept(spec: AttentionSpec) -> tuple[int | None, ...]:
    return spec.num_kv_heads, spec.head_dim, spec.window, spec.chunk


def _for_longer_context(layer: LayerSpec) -> LayerSpec:
    def changed(mixer: Any) -> Any:
        if isinstance(mixer, ParallelSpec):
            return replace(mixer, branches=tuple(replace(b, mixer=changed(b.mixer)) for b in mixer.branches))
        has_rope = isinstance(mixer, AttentionSpec | MlaSpec) and mixer.rope is not None
        return replace(mixer, rope=mixer.rope.for_longer_context()) if has_rope else mixer

    shared = layer.shared and replace(layer.shared, attention=changed(layer.shared.attention))
    return replace(layer, mixer=changed(layer.mixer), shared=shared)
