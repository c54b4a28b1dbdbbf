"""What goes along with the residual stream, or stands in for it, as data: inputs of each layer's own, several streams."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.models.mlp_spec import Activation


@dataclass(frozen=True, kw_only=True)
class LayerInputsSpec:
    """Each layer has an embedding of each token beside the model's (Gemma 3n), which a gate lets into the residual stream.

    Attributes:
        dim: P, of each layer's embeddings.
        vocab_size: tokens that have such embeddings; the others have those of token 0.
        activation: of the gate.
    """

    dim: int
    vocab_size: int
    activation: Activation

    def __post_init__(self) -> None:
        if self.dim < 1 or self.vocab_size < 1:
            raise ValueError(f"dim and vocab_size must be at least 1; got {self.dim} and {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class AltUpSpec:
    """Several residual streams, of which layers compute one and predict the others (AltUp, https://arxiv.org/abs/2301.13310).

    Attributes:
        num_streams: A.
        active: the stream that layers compute.
        scales_output: what gates a layer's own input is the active stream times a gain.
    """

    num_streams: int
    active: int
    scales_output: bool

    def __post_init__(self) -> None:
        if not 0 <= self.active < self.num_streams:
            raise ValueError(f"the active stream must be one of {self.num_streams}; got {self.active}")
