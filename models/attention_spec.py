"""Softmax attention as data, in every variant that decoders use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jaxserve.errors import ConfigError
from jaxserve.models.norm_spec import NormSpec
from jaxserve.models.rope_spec import RopeSpec


@dataclass(frozen=True, kw_only=True)
class TemperatureSpec:
    """q grows with the position p: times 1 + scale * log(1 + floor((p + offset) / length)) (Llama 4)."""

    scale: float
    length: float
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal attention with grouped kv heads.

    Attributes:
        num_kv_heads: K as the checkpoint has it.
        scale: factor on the scores before the softmax.
        window: keys that a token sees, itself included; None for all of them.
        chunk: a token sees only its own chunk of this many positions (Llama 4).
        softcap: scores become softcap * tanh(scores / softcap).
        qk_norm: normalises q and k.
        qk_norm_over: each head with one gain for all; each head with a gain of its own; or all heads together.
        qk_norm_after_rope: the order of the two.
        v_norm: normalises each head of v.
        v_from_k: the checkpoint has one projection for keys, before their norm, and values (Gemma 4).
        value_multiplier: factor on v (MiMo V2).
        clip: q, k and v are kept within +-clip.
        qkv_bias: a bias on q, k and v.
        out_bias: a bias on the output projection.
        out_gate: the output of each head is multiplied by sigmoid of a projection of the input.
        gate_bias: a bias on that projection.
        gate_activation: instead of the sigmoid (Laguna).
        gate_per_head: a number for each head, instead of one for each of its dimensions.
        out_norm: normalises the output of all heads together (BitNet).
        sinks: each head has a logit that takes part in the softmax without a value (gpt-oss).
        alibi: slope of each head: slope * (key position - query position) is added to the scores
            (https://arxiv.org/abs/2108.12409).
        alibi_rounded: slopes and slope * key position are rounded to bfloat16, then scaled as scores are (Falcon).
        temperature: q grows with the position.
        kv_repeat: how often our arrays repeat each kv head of the checkpoint, one after the other.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    qk_norm: NormSpec | None = None
    qk_norm_over: Literal["head", "each_head", "all_heads"] = "head"
    qk_norm_after_rope: bool = False
    v_norm: NormSpec | None = None
    v_from_k: bool = False
    value_multiplier: float = 1.0
    clip: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    out_gate: bool = False
    gate_bias: bool = False
    gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"
    gate_per_head: bool = False
    out_norm: NormSpec | None = None
    sinks: bool = False
    alibi: tuple[float, ...] | None = None
    alibi_rounded: bool = False
    temperature: TemperatureSpec | None = None
    kv_repeat: int = 1

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "window", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.rope is not None and self.rope.rotary_dim > self.head_dim:
            raise ValueError(f"{self.rope.rotary_dim} dimensions cannot be rotated in heads of {self.head_dim}")

    @property
    def can_repeat(self) -> bool:
        """Whether kv heads may be held several times."""
        return type(self) is AttentionSpec

    @property
    def array_kv_heads(self) -> int:
        """K of our arrays, repeats included."""
        return self.num_kv_heads * self.kv_repeat

    @property
    def group_size(self) -> int:
        """G of our arrays: query heads for each of their kv heads."""
        return self.num_heads // self.array_kv_heads

    @property
    def value_dim(self) -> int:
        """Dimensions of a head's values."""
        return self.head_dim

    def repeated(self, times: int) -> AttentionSpec:
        """This attention with each kv head held several times.

        Raises:
            ConfigError: if the query heads of a kv head do not divide among its repeats.
        """
        group = self.num_heads // self.num_kv_heads
        if group % times:
            raise ConfigError(
                f"each kv head serves {group} query heads, which do not divide over {times} devices. "
                "Lower --tensor-parallel-size."
            )
        if times > 1 and not self.can_repeat:
            raise ConfigError("this model's kv heads cannot be repeated. Lower --tensor-parallel-size.")
        return replace(self, kv_repeat=times)


@dataclass(frozen=True, kw_only=True)
class DifferentialAttentionSpec(AttentionSpec):
    """The difference of two softmaxes over keys (https://arxiv.org/abs/2410.05258): the second half of the heads is noise.

    Attributes:
        start: of lambda, the second one's factor.
        eps: of the norm over each pair of heads.
    """

    start: float
    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_kv_heads % 2:
            raise ValueError(f"differential attention needs an even number of kv heads; got {self.num_kv_heads}")


@dataclass(frozen=True, kw_only=True)
class BorrowingAttentionSpec(AttentionSpec):
    """Attention to the keys and values of an earlier layer (Gemma 3n); what it says of keys and values is that layer's.

    Attributes:
        kv_from: number of that layer.
    """

    kv_from: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None or self.temperature is not None or self.qk_norm_after_rope:
            raise ValueError("attention to another layer's keys has no clip, no temperature and no norm after rope")

    @property
    def can_repeat(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class NarrowValueAttentionSpec(AttentionSpec):
    """Attention whose values have fewer dimensions than its keys (MiMo V2).

    Attributes:
        narrow_dim: of a head's values.
    """

    narrow_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.narrow_dim < self.head_dim:
            raise ValueError(f"values must have from 1 to {self.head_dim - 1} dimensions; got {self.narrow_dim}")
        if self.v_norm is not None or self.out_gate or self.out_norm is not None:
            raise ValueError("attention with narrow values has no norm of values or of its output, and no gate")

    @property
    def can_repeat(self) -> bool:
        return True

    @property
    def value_dim(self) -> int:
        return self.narrow_dim


@dataclass(frozen=True, kw_only=True)
class ValueLogitAttentionSpec(AttentionSpec):
    """A key's score is raised by exp(A * softplus(projection of its value)), for each kv head apart (Doge)."""


@dataclass(frozen=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434): keys and values of all heads come from one latent.

    Attributes:
        q_rank: width that q is made from; None if it is made from the model's width at once.
        kv_rank: width of the latent.
        nope_dim, rope_dim: dimensions of q and k without and with positions; the latter are shared by all heads.
        v_dim: dimensions of a head's value.
        kv_multiplier: factor on the normalised latent of keys and values (LongCat).
        out_gate: the output of each head is multiplied by sigmoid of a number projected from the input (Ling 3).
        latent_norm: of what q and of what keys and values are made from.
        bias: on the projections to the latents, and on the output projection.
        temperature: q grows with the position.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    rope: RopeSpec | None
    latent_norm: NormSpec
    kv_multiplier: float = 1.0
    out_gate: bool = False
    bias: bool = False
    temperature: TemperatureSpec | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
