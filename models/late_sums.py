"""Layers of one GPU where the kernel of an RMS norm adds what the block before it gives to the residual stream. Knows plain layers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Array

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.mlp import Mlp
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.unsummed import Unadded, add_product
from jaxserve.models.spec import Shares

if TYPE_CHECKING:
    from jaxserve.models.decoder import DecoderLayer


def serves(layer: DecoderLayer) -> bool:
    """Whether attention and an mlp, with an RMS norm in front of each, add to the residual stream, and nothing else happens."""
    spec, norm = layer.spec, layer.spec.norm
    if type(layer.mixer) is not Attention or type(layer.mlp) is not Mlp or spec.norm_placement != "pre":
        return False
    others = (layer.mixer_gain, layer.gain, layer.laurel, layer.input, layer.altup, layer.shared_use, layer.shortcut)
    is_other = any(x is not None for x in others) or spec.residual_from_norm or spec.residual_multiplier != 1.0
    is_rms = norm.kind == "rms" and norm.gain and not norm.bias
    ends = layer.mixer.ends_in_product and layer.mlp.ends_in_product
    return is_rms and ends and layer.mixer_shares == layer.mlp_shares == Shares() and not is_other


def run(
    layer: DecoderLayer,
    x: Array | Unadded,
    caches: tuple[Array, ...],
    batch: StepBatch,
    rotation: Rotation | None,
    runtime: Runtime,
) -> tuple[Array | Unadded, tuple[Array, ...]]:
    """The layer; what its mlp gives may be left to the next one to add."""
    mixer, mlp = layer.mixer, layer.mlp
    assert isinstance(mixer, Attention) and isinstance(mlp, Mlp) and layer.mixer_norm and layer.mlp_norm
    x, normed = layer.mixer_norm.of_sum(x, mixer.readers(), runtime)
    mixed, caches = mixer.heads(normed, caches, batch, rotation, runtime)
    x = add_product(x, mixed, mixer.out.get_value(), runtime, contract=2)
    x, normed = layer.mlp_norm.of_sum(x, mlp.readers(), runtime)
    return add_product(x, mlp.hidden(normed), mlp.down.get_value(), runtime), caches
