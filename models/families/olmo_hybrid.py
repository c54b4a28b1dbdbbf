"""OLMo Hybrid: OLMo 3's attention with norms behind it in some layers, gated delta nets with norms before them in the others."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import OneOf, Projection, Same
from jaxserve.models.families.from_config import attention, decoder, flags, layer_types, mlp, rms
from jaxserve.models.families.gated_delta import gated_delta, qk_rows, qkv_sizes, v_rows
from jaxserve.models.families.llama import BIASES
from jaxserve.models.families.olmo import OLMO2
from jaxserve.models.families.recurrent_tensors import ConvRows, CutConv, Joined, Rows, either
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table
from jaxserve.models.spec import DecoderSpec, MixerSpec


def _olmo_hybrid(config: HfConfig) -> DecoderSpec:
    parameters = config.rope_parameters
    position = rope(config) if parameters is not None and parameters.get("rope_theta") is not None else None
    heads = attention(config, position, **flags(config, BIASES), qk_norm=rms(config), qk_norm_over="all_heads")
    delta = replace(gated_delta(config), norm_eps=1e-5, negative_eigenvalues=bool(config.linear_allow_neg_eigval))
    mixers: dict[str, MixerSpec] = {"full_attention": heads, "linear_attention": delta}
    kinds = layer_types(config, *mixers)
    spec = decoder(config, rms(config), lambda i: mixers[kinds[i]], mlp(config))
    return replace(
        spec, layers=tuple(replace(layer, norm_placement="post") if layer.attention else layer for layer in spec.layers)
    )


_LINEAR = LAYER + "linear_attn."
_MIXER = "layers.{i}.mixer."
_CONVS = tuple(f"{_LINEAR}{name}_conv1d.weight" for name in "qkv")
_DELTA: Table = {
    _MIXER + "qk": Joined(tuple(Rows(f"{_LINEAR}{name}_proj.weight", axes=2) for name in "qk"), axis=-3),
    _MIXER + "vz": Joined(tuple(Rows(f"{_LINEAR}{name}_proj.weight", axes=3) for name in "vg"), axis=-4),
    _MIXER + "ba": Joined(tuple(Rows(f"{_LINEAR}{name}_proj.weight", axes=2) for name in "ba"), axis=-3),
    _MIXER + "conv_qk": CutConv(_CONVS, ConvRows("", axes=3, part=qk_rows), qkv_sizes),
    _MIXER + "conv_v": CutConv(_CONVS, ConvRows("", axes=3, part=v_rows), qkv_sizes),
    _MIXER + "dt_bias": Rows(f"{_LINEAR}dt_bias", axes=2),
    _MIXER + "a_log": Rows(f"{_LINEAR}A_log", axes=2),
    _MIXER + "norm": Same(f"{_LINEAR}o_norm.weight"),
    _MIXER + "out": Projection(f"{_LINEAR}o_proj.weight"),
}


def _either_name(*names: str) -> OneOf:
    """The published checkpoints' name of a norm, or transformers'."""
    return OneOf(tuple(Same(f"{LAYER}{name}.weight") for name in names))


_NORMS: Table = {
    "layers.{i}.mixer_norm.weight": _either_name("attention_layer_norm", "input_layernorm"),
    "layers.{i}.mlp_norm.weight": _either_name("feedforward_layer_norm", "post_attention_layernorm"),
    "layers.{i}.mixer_out_norm.weight": _either_name("post_attention_layernorm", "feedforward_layer_norm"),
}

ARCHITECTURES = (
    Architecture(
        name="OlmoHybridForCausalLM", model_type="olmo_hybrid", spec=_olmo_hybrid, tensors=either(OLMO2, _DELTA) | _NORMS
    ),
)
