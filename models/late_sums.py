"""Layers where the kernel of an RMS norm adds up what the block before it gives: parts of a product, devices' sums, the residual stream.

Knows plain layers alone. On several devices it is the sum that they send each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Array, Float

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.mlp import Mlp
from jaxserve.models.layers.norms import Norm, apply_norm_for
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight, have_kernels
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.layers.unsummed import Unadded, add_product, added_normed
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
    x, normed = _normed(layer.mixer_norm, x, mixer.readers(), batch, runtime)
    mixed, caches = mixer.heads(normed, caches, batch, rotation, runtime)
    x = add_product(x, mixed, mixer.out.get_value(), batch, runtime, contract=2)
    x, normed = _normed(layer.mlp_norm, x, mlp.readers(), batch, runtime)
    return add_product(x, mlp.hidden(normed), mlp.down.get_value(), batch, runtime), caches


def _normed(
    norm: Norm,
    x: Float[Array, "T D"] | Unadded,
    readers: tuple[Array | Fp8Weight, ...],
    batch: StepBatch,
    runtime: Runtime,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"] | Fp8Rows]:
    """The residual stream with what it waits for, and the norm of that, in 8 bits if all that read it take such rows."""
    if not isinstance(x, Unadded):
        return x, apply_norm_for(readers, norm, x, norm(x))
    offset = 1.0 if norm.spec.unit_offset else 0.0
    return added_normed(x, norm.gain(), batch, runtime, eps=norm.spec.eps, offset=offset, rounds=have_kernels(readers))
