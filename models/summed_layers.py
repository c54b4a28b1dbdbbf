"""Layers of GPUs that add up by themselves, where an RMS norm follows each sum: one kernel does both. Knows plain layers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.linear import add_parts_normed, linear_of_parts
from jaxserve.models.layers.mlp import Mlp
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.quantized import Fp8Weight
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

if TYPE_CHECKING:
    from jaxserve.models.decoder import DecoderLayer

# Of a DecoderSpec, what concerns no layer: everything else has to be as it is by default.
OUTSIDE_LAYERS = (
    *("vocab_size", "d_model", "layers", "norm", "max_position", "final_norm", "final_norm_eps", "embed_norm", "embed_scale"),
    *("embed_dim", "positions", "tie_embeddings", "head_bias", "logit_multiplier", "logit_softcap"),
)
KV_HEADS, FFN = 0, 1  # of the outputs of qkv [K, G + 2, H] and of up [2, F], which one is cut over the devices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stream:
    """The residual stream, and its norm, which the next layer reads."""

    x: Float[Array, "T D"]
    normed: Float[Array, "T D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Following:
    """The layer behind, as far as this one's last sum concerns it: its first norm, and the weights that read that."""

    gain: Float[Array, " D"]
    qkv: Array | Fp8Weight
    eps: float = field(metadata={"static": True})
    offset: float = field(metadata={"static": True})


def serves(spec: DecoderSpec, batch: StepBatch, runtime: Runtime) -> bool:
    """Whether devices add up by themselves, and all layers are attention, then an mlp, each behind an RMS norm and nothing else."""
    if runtime.mesh is None or batch.peers is None or not runtime.norms_sums:
        return False
    size, norm = runtime.mesh.size, spec.norm
    has_plain_norms = norm == NormSpec(eps=norm.eps, unit_offset=norm.unit_offset)
    is_plain = spec == DecoderSpec(**{name: getattr(spec, name) for name in OUTSIDE_LAYERS})
    return has_plain_norms and is_plain and all(_is_plain(layer, size) for layer in spec.layers)


def enter(x: Float[Array, "T D"], first: DecoderLayer) -> Stream:
    """What the first layer receives."""
    assert first.mixer_norm is not None
    return Stream(x, first.mixer_norm(x))


def following(layer: DecoderLayer) -> Following:
    """What the layer before needs to know of a layer."""
    assert layer.mixer_norm is not None and isinstance(layer.mixer, Attention)
    return Following(layer.mixer_norm.gain(), layer.mixer.qkv.get_value(), *_constants(layer.mixer_norm))


@partial(jax.jit, static_argnames=("graphdef", "runtime"))
def run_layer(
    graphdef: nnx.GraphDef[DecoderLayer],
    state: Any,
    stream: Stream,
    caches: tuple[Array, ...],
    batch: StepBatch,
    rotation: Rotation | None,
    runtime: Runtime,
    behind: Following | None,
) -> tuple[Stream | Float[Array, "T D"], tuple[Array, ...]]:
    """As the decoder's own, layers alike are traced once. Behind the last one there is a residual stream alone."""
    layer = nnx.merge(graphdef, state)
    mixer, mlp, norm = layer.mixer, layer.mlp, layer.mlp_norm
    assert isinstance(mixer, Attention) and isinstance(mlp, Mlp) and norm is not None
    devices: Any = {"batch": batch, "runtime": runtime}
    mixed, caches = mixer.heads(stream.normed, caches, batch, rotation, runtime)
    own_norm, out, up = (norm.gain(), *_constants(norm)), mixer.out.get_value(), mlp.up.get_value()
    x, normed = add_parts_normed(stream.x, mixed, out, own_norm, up, **devices, contract=2, reader_axis=FFN)
    hidden, down = mlp.hidden(normed), mlp.down.get_value()
    if behind is None:
        return x + linear_of_parts(hidden, down, **devices), caches
    next_norm = behind.gain, behind.eps, behind.offset
    return Stream(*add_parts_normed(x, hidden, down, next_norm, behind.qkv, **devices, reader_axis=KV_HEADS)), caches


def _is_plain(layer: LayerSpec, devices: int) -> bool:
    mixer, mlp = layer.mixer, layer.mlp
    if type(mixer) is not AttentionSpec or type(mlp) is not MlpSpec or layer != LayerSpec(mixer=mixer, mlp=mlp):
        return False
    is_cut = not any(n % devices for n in (mixer.num_heads, mixer.array_kv_heads, mlp.dim))
    return is_cut and not (mixer.out_bias or mlp.bias) and mlp.out_multiplier == 1.0


def _constants(norm: Norm) -> tuple[float, float]:
    return norm.spec.eps, 1.0 if norm.spec.unit_offset else 0.0
