"""DecoderSpec: an architecture as data. Families make it from a Hugging Face config; the one decoder is built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from jaxserve.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor`: positions are interpolated."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended.

    Attributes:
        low_freq_factor: wavelengths above original_max_position / low_freq_factor are scaled in full.
        high_freq_factor: wavelengths below original_max_position / high_freq_factor are kept.
        original_max_position: tokens of context that the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), first half of a head paired with the second.

    Attributes:
        theta: base of the wavelengths.
        rotary_dim: leading dimensions of a head that are rotated.
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation over the last axis.

    Attributes:
        unit_offset: the gain is 1 + weight (Gemma).
        bias: a bias is added.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    unit_offset: bool = False
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal attention with grouped kv heads.

    Attributes:
        num_kv_heads: K as the checkpoint has it.
        scale: factor on the scores before the softmax.
        window: keys that a token sees, itself included; None for all of them.
        softcap: scores become softcap * tanh(scores / softcap).
        qk_norm: normalises q and k of each head over H, before rope.
        qkv_bias: a bias on q, k and v.
        out_bias: a bias on the output projection.
        kv_repeat: how often our arrays repeat each kv head of the checkpoint, one after the other.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    softcap: float | None = None
    qk_norm: NormSpec | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    kv_repeat: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "num_kv_heads", "head_dim", "window")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")

    @property
    def array_kv_heads(self) -> int:
        """K of our arrays, repeats included."""
        return self.num_kv_heads * self.kv_repeat

    @property
    def group_size(self) -> int:
        """G of our arrays: query heads for each of their kv heads."""
        return self.num_heads // self.array_kv_heads


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """A feed-forward block.

    Attributes:
        dim: F.
        gated: activation(gate) * up; otherwise activation(up).
        bias: a bias on every projection.
    """

    dim: int
    activation: Activation
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "dim")


@dataclass(frozen=True, kw_only=True)
class MambaSpec:
    """A selective state space with a state for each channel (Mamba, https://arxiv.org/abs/2312.00752).

    Attributes:
        dim: channels.
        state_dim: values that each channel keeps.
        dt_rank: width of what the time steps are projected from.
        conv_kernel: tokens that the causal convolution sees.
        activation: after the convolution.
        conv_bias: a bias on the convolution.
        proj_bias: a bias on the projections in and out.
        inner_norm: normalises dt, B and C before they are used (Jamba).
    """

    dim: int
    state_dim: int
    dt_rank: int
    conv_kernel: int
    activation: Activation
    conv_bias: bool = True
    proj_bias: bool = False
    inner_norm: NormSpec | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "dim", "state_dim", "dt_rank", "conv_kernel")


MixerSpec = AttentionSpec | MambaSpec  # everything that can mix tokens


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: a mixer over tokens, then an mlp over each of them. Either may be missing."""

    mixer: MixerSpec | None
    mlp: MlpSpec | None

    @property
    def attention(self) -> AttentionSpec | None:
        """The attention among its mixers."""
        return self.mixer if isinstance(self.mixer, AttentionSpec) else None

    @property
    def rope(self) -> RopeSpec | None:
        return None if self.attention is None else self.attention.rope


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only language model.

    Attributes:
        norm: of every norm in and after the layers, those within a mixer apart.
        norm_placement: "pre" normalises what goes into mixer and mlp; "sandwich" also what comes out.
        embed_scale: factor on the embeddings, rounded to their dtype as checkpoints were trained with.
        tie_embeddings: the output projection is the embedding table.
        residual_multiplier: factor on what mixer and mlp add to the residual stream.
        logit_multiplier: factor on the logits.
        logit_softcap: logits become softcap * tanh(logits / softcap), after the multiplier.
        max_position: longest context that the model is made for, in tokens.
    """

    vocab_size: int
    d_model: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    norm_placement: Literal["pre", "sandwich"] = "pre"
    embed_scale: float | None = None
    tie_embeddings: bool = False
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    max_position: int

    def __post_init__(self) -> None:
        _check_positive(self, "vocab_size", "d_model", "max_position")

    def with_kv_repeat(self, repeat: Callable[[int], int]) -> DecoderSpec:
        """This model with each kv head held several times, for more devices than kv heads.

        Args:
            repeat: how often, from the number of kv heads that a layer's checkpoint has.

        Raises:
            ConfigError: if the query heads of a kv head do not divide among its repeats.
        """
        return replace(self, layers=tuple(replace(layer, mixer=_repeat_kv(layer.mixer, repeat)) for layer in self.layers))


def _repeat_kv(mixer: MixerSpec | None, repeat: Callable[[int], int]) -> MixerSpec | None:
    if not isinstance(mixer, AttentionSpec):
        return mixer
    group, times = mixer.num_heads // mixer.num_kv_heads, repeat(mixer.num_kv_heads)
    if group % times:
        raise ConfigError(
            f"each kv head serves {group} query heads, which do not divide over {times} devices. Lower --tensor-parallel-size."
        )
    return replace(mixer, kv_repeat=times)


def _check_positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
