"""Mixers that keep a state for each request, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.models.mlp_spec import Activation
from jaxserve.models.norm_spec import NormSpec


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
        inner_norm: normalises dt, B and C before they are used (Jamba, FalconMamba).
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


@dataclass(frozen=True, kw_only=True)
class Mamba2Spec:
    """A state space with a matrix of state for each head (Mamba 2, https://arxiv.org/abs/2405.21060).

    Attributes:
        state_dim: N, values of state for each of a head's dimensions.
        num_groups: heads of a group share what is written and read (B and C).
        activation: after the convolution.
        dt_min, dt_max: bounds of the time steps.
        norm: of the output, which a gate multiplies: normalised "before" it, "after" it, or None for the gate alone.
        norm_eps: of that norm, which goes over each group.
        multipliers: of z, x, B, C and dt as they are projected (Falcon-H1).
    """

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv_kernel: int
    activation: Activation
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    dt_min: float = 0.0
    dt_max: float = float("inf")
    norm: Literal["before", "after"] | None = "after"
    norm_eps: float = 1e-5
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "head_dim", "state_dim", "num_groups", "conv_kernel")
        _check_divides(self, "num_groups", "num_heads")


@dataclass(frozen=True, kw_only=True)
class GatedDeltaSpec:
    """Linear attention that replaces what it has stored under a key (gated delta rule, https://arxiv.org/abs/2412.06464).

    Attributes:
        activation: after the convolution.
        norm_eps: of the output's norm, over each head, before the gate.
        negative_eigenvalues: keys are replaced by up to twice their value, not once (OLMo Hybrid).
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    activation: Activation
    norm_eps: float
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "num_key_heads", "num_value_heads", "key_dim", "value_dim", "conv_kernel")
        _check_divides(self, "num_key_heads", "num_value_heads")


@dataclass(frozen=True, kw_only=True)
class KimiDeltaSpec:
    """As GatedDeltaSpec, but each dimension of a key decays at a pace of its own (https://arxiv.org/abs/2510.26692).

    Attributes:
        head_dim: of keys and of values.
        rank: that the decays and the output's gate are made from; None if they are made from the model's width at once.
        decay_floor: a decay's logarithm is at least this: floor * sigmoid(exp(a_log) (decay(x) + dt_bias)) (Ling 3).
        activation: after the convolution.
        norm_eps: of the output's norm, over each head, before the gate.
    """

    num_heads: int
    head_dim: int
    rank: int | None
    conv_kernel: int
    activation: Activation
    norm_eps: float
    decay_floor: float | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "head_dim", "conv_kernel")
        if self.rank is not None:
            _check_positive(self, "rank")


@dataclass(frozen=True, kw_only=True)
class LightningSpec:
    """Linear attention with a constant decay for each head (https://arxiv.org/abs/2401.04658).

    Attributes:
        activation: of q, k and v.
        decays: of each head: its state is multiplied by exp(-decay) at each token.
        norm_eps: of the output's norm, over all heads, before the gate.
    """

    head_dim: int
    activation: Activation
    decays: tuple[float, ...]
    norm_eps: float

    def __post_init__(self) -> None:
        _check_positive(self, "head_dim")

    @property
    def num_heads(self) -> int:
        return len(self.decays)


@dataclass(frozen=True, kw_only=True)
class ShortConvSpec:
    """A short convolution between two gates, and nothing else (LFM2).

    Attributes:
        bias: a bias on both projections and on the convolution.
    """

    conv_kernel: int
    bias: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "conv_kernel")


@dataclass(frozen=True, kw_only=True)
class RgLruSpec:
    """A real-gated linear recurrent unit beside a gate (Griffin, https://arxiv.org/abs/2402.19427).

    Attributes:
        width: channels, each with one value of state.
        num_blocks: the unit's own gates see only their block of the channels.
        activation: of the gate beside it.
    """

    width: int
    num_blocks: int
    conv_kernel: int
    activation: Activation

    def __post_init__(self) -> None:
        _check_positive(self, "width", "num_blocks", "conv_kernel")
        _check_divides(self, "num_blocks", "width")


@dataclass(frozen=True, kw_only=True)
class TimeMixSpec:
    """RWKV 4's mixer (https://arxiv.org/abs/2305.13048): a weighted mean of all values so far, older ones weighing less."""

    dim: int

    def __post_init__(self) -> None:
        _check_positive(self, "dim")


@dataclass(frozen=True, kw_only=True)
class ChannelMixSpec:
    """RWKV 4's feed-forward block, which sees the token before as well.

    Attributes:
        dim: F.
    """

    dim: int

    def __post_init__(self) -> None:
        _check_positive(self, "dim")


RecurrentSpec = MambaSpec | Mamba2Spec | GatedDeltaSpec | KimiDeltaSpec | LightningSpec | ShortConvSpec | RgLruSpec | TimeMixSpec
"""Everything that mixes tokens through a state."""


def _check_positive(spec: object, *names: str) -> None:
    for name in names:
        if getattr(spec, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(spec, name)}")


def _check_divides(spec: object, part: str, whole: str) -> None:
    if getattr(spec, whole) % getattr(spec, part):
        raise ValueError(f"{part}={getattr(spec, part)} must divide {whole}={getattr(spec, whole)}")
