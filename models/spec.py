"""DecoderSpec: an architecture as data. Families make it from a Hugging Face config; the one decoder is built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from jaxserve.errors import ConfigError
from jaxserve.models.attention_spec import (
    AttentionSpec,
    DifferentialAttentionSpec,
    MlaSpec,
    TemperatureSpec,
    ValueLogitAttentionSpec,
)
from jaxserve.models.mlp_spec import Activation, ClampedSwiglu, MlpSpec, MoeSpec, RouterSpec
from jaxserve.models.norm_spec import NormSpec
from jaxserve.models.recurrent_spec import MambaSpec
from jaxserve.models.rope_spec import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

__all__ = [
    "Activation",
    "AttentionSpec",
    "ClampedSwiglu",
    "DecoderSpec",
    "DifferentialAttentionSpec",
    "FactorScaling",
    "LayerSpec",
    "LinearScaling",
    "Llama3Scaling",
    "MambaSpec",
    "MixerSpec",
    "MlaSpec",
    "MlpSpec",
    "MoeSpec",
    "NormPlacement",
    "NormSpec",
    "PositionSpec",
    "RopeScaling",
    "RopeSpec",
    "RouterSpec",
    "TemperatureSpec",
    "ValueLogitAttentionSpec",
    "YarnScaling",
]

MixerSpec = AttentionSpec | MlaSpec | MambaSpec
"""Everything that can mix tokens."""

NormPlacement = Literal["pre", "sandwich", "post", "after", "parallel", "parallel_shared"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: a mixer over tokens, then an mlp over each of them. Either may be missing."""

    mixer: MixerSpec | None
    mlp: MlpSpec | MoeSpec | None

    @property
    def attention(self) -> AttentionSpec | None:
        """The attention among its mixers."""
        return self.mixer if isinstance(self.mixer, AttentionSpec) else None

    @property
    def rope(self) -> RopeSpec | None:
        return self.mixer.rope if isinstance(self.mixer, AttentionSpec | MlaSpec) else None


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
        embed_norm: of the embeddings.
        embed_scale: factor on the embeddings, rounded to their dtype as checkpoints were trained with.
        embed_dim: of the token embeddings, where projections lead from it to d_model and back (OPT).
        positions: added to the embeddings.
        tie_embeddings: the output projection is the embedding table.
        head_bias: a bias on the logits.
        residual_multiplier: factor on what mixer and mlp add to the residual stream.
        residual_from_norm: mixer and mlp add to what the norm before them gave, not to what went into it.
        residual_gain: the residual stream is multiplied by a weight of its own before each addition (Doge).
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
    embed_norm: NormSpec | None = None
    embed_scale: float | None = None
    embed_dim: int | None = None
    positions: PositionSpec | None = None
    tie_embeddings: bool = False
    head_bias: bool = False
    residual_multiplier: float = 1.0
    residual_from_norm: bool = False
    residual_gain: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    max_position: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "max_position", "embed_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")

    def with_kv_repeat(self, repeat: Callable[[int], int]) -> DecoderSpec:
        """This model with each kv head held several times, for more devices than kv heads.

        Args:
            repeat: how often, from the number of kv heads that a layer's checkpoint has.

        Raises:
            ConfigError: if the query heads of a kv head do not divide among its repeats, or heads with one latent not at all.
        """

        def repeated(mixer: MixerSpec | None) -> MixerSpec | None:
            if isinstance(mixer, MlaSpec) and repeat(mixer.num_heads) != 1:
                raise ConfigError(
                    f"the model's {mixer.num_heads} heads are fewer than the devices. Lower --tensor-parallel-size."
                )
            return mixer.repeated(repeat(mixer.num_kv_heads)) if isinstance(mixer, AttentionSpec) else mixer

        return replace(self, layers=tuple(replace(layer, mixer=repeated(layer.mixer)) for layer in self.layers))
