"""What a layer mixes tokens with: the module for each MixerSpec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StepBatch
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.borrowing_attention import BorrowingAttention
from jaxserve.models.layers.differential_attention import DifferentialAttention
from jaxserve.models.layers.gated_conv import GatedConv
from jaxserve.models.layers.gated_delta import GatedDelta
from jaxserve.models.layers.kimi_delta import KimiDelta
from jaxserve.models.layers.lightning import Lightning
from jaxserve.models.layers.mamba import Mamba
from jaxserve.models.layers.mamba2 import Mamba2
from jaxserve.models.layers.mla import Mla
from jaxserve.models.layers.narrow_value_attention import NarrowValueAttention
from jaxserve.models.layers.parallel import Parallel
from jaxserve.models.layers.rg_lru import RgLru
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.rwkv import TimeMix
from jaxserve.models.layers.value_logit_attention import ValueLogitAttention
from jaxserve.models.recurrent_spec import (
    GatedDeltaSpec,
    KimiDeltaSpec,
    LightningSpec,
    Mamba2Spec,
    MambaSpec,
    RgLruSpec,
    ShortConvSpec,
    TimeMixSpec,
)
from jaxserve.models.spec import (
    AttentionSpec,
    BorrowingAttentionSpec,
    DifferentialAttentionSpec,
    MixerSpec,
    MlaSpec,
    NarrowValueAttentionSpec,
    ParallelSpec,
    ValueLogitAttentionSpec,
)


class Mixer(Protocol):
    """Mixes the tokens of each request, and keeps what it needs of them for later steps."""

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """Gives the layer's output, and the caches with this step's tokens.

        Args:
            caches: one for each of cache_specs(), in its order; where it has none, those of the layer whose pages it reads.
        """
        ...

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]: ...


MODULES: dict[type, Callable[..., Any]] = {
    AttentionSpec: Attention,
    BorrowingAttentionSpec: BorrowingAttention,
    DifferentialAttentionSpec: DifferentialAttention,
    GatedDeltaSpec: GatedDelta,
    KimiDeltaSpec: KimiDelta,
    LightningSpec: Lightning,
    Mamba2Spec: Mamba2,
    MambaSpec: Mamba,
    MlaSpec: Mla,
    NarrowValueAttentionSpec: NarrowValueAttention,
    RgLruSpec: RgLru,
    ShortConvSpec: GatedConv,
    TimeMixSpec: TimeMix,
    ValueLogitAttentionSpec: ValueLogitAttention,
}
"""The module that each kind of mixer is built from: (d_model, spec, dtype)."""


def make_mixer(d_model: int, spec: MixerSpec, dtype: DTypeLike) -> Any:
    """The Mixer that a spec describes."""
    if isinstance(spec, ParallelSpec):
        return Parallel(spec, [make_mixer(d_model, branch.mixer, dtype) for branch in spec.branches])
    return MODULES[type(spec)](d_model, spec, dtype)
