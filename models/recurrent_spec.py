"""Recurrent mixers as data."""

from __future__ import annotations

from dataclasses import dataclass

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
        for name in ("dim", "state_dim", "dt_rank", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
