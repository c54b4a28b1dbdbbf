"""What a layer mixes tokens with: the module for each MixerSpec."""

from __future__ import annotations

from typing import Protocol

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StepBatch
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.differential_attention import DifferentialAttention
from jaxserve.models.layers.mamba import Mamba
from jaxserve.models.layers.mla import Mla
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.value_logit_attention import ValueLogitAttention
from jaxserve.models.spec import (
    AttentionSpec,
    DifferentialAttentionSpec,
    MambaSpec,
    MixerSpec,
    MlaSpec,
    ValueLogitAttentionSpec,
)


class Mixer(Protocol):
    """Mixes the tokens of each request, and keeps what it needs of them for later steps."""

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """Gives the layer's output, and the caches with this step's tokens.

        Args:
            caches: one for each of cache_specs(), in its order.
        """
        ...

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]: ...


def make_mixer(d_model: int, spec: MixerSpec, dtype: DTypeLike) -> Attention | Mla | Mamba:
    """The module that a spec describes."""
    match spec:
        case DifferentialAttentionSpec():
            return DifferentialAttention(d_model, spec, dtype)
        case ValueLogitAttentionSpec():
            return ValueLogitAttention(d_model, spec, dtype)
        case AttentionSpec():
            return Attention(d_model, spec, dtype)
        case MlaSpec():
            return Mla(d_model, spec, dtype)
        case MambaSpec():
            return Mamba(d_model, spec, dtype)
