"""MiniMax-Text-01: lightning attention, and softmax attention in some layers, with experts in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection
from jaxserve.models.families.from_config import activation, attention, decoder, head_dim, layer_types, rms
from jaxserve.models.families.moe import experts
from jaxserve.models.families.recurrent_tensors import Rows, either
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors, tensors
from jaxserve.models.recurrent_spec import LightningSpec
from jaxserve.models.spec import DecoderSpec, LayerSpec, MixerSpec, RouterSpec, Shares

_NORM_EPS = 1e-6  # of lightning attention's norm; the config has no say in it


def _minimax(config: HfConfig) -> DecoderSpec:
    kinds = layer_types(config, "full_attention", "linear_attention")
    heads = attention(config, rope(config), window=config.sliding_window)

    def mixer(layer: int) -> MixerSpec:
        if kinds[layer] == "full_attention":
            return heads
        act = activation(config.hidden_act)
        return LightningSpec(head_dim=head_dim(config), activation=act, decays=_decays(config, layer), norm_eps=_NORM_EPS)

    block = experts(config, config.num_local_experts, config.num_experts_per_tok, RouterSpec())
    spec = decoder(config, rms(config), mixer, block, residual_from_norm=True)
    shares = {
        "full_attention": Shares(kept=config.full_attn_alpha_factor, added=config.full_attn_beta_factor),
        "linear_attention": Shares(kept=config.linear_attn_alpha_factor, added=config.linear_attn_beta_factor),
    }
    of_mlp = Shares(kept=config.mlp_alpha_factor, added=config.mlp_beta_factor)

    def shared(layer: LayerSpec, kind: str) -> LayerSpec:
        return replace(layer, mixer_shares=shares[kind], mlp_shares=of_mlp)

    return replace(spec, layers=tuple(map(shared, spec.layers, kinds)))


def _decays(config: HfConfig, layer: int) -> tuple[float, ...]:
    """ALiBi's slopes, smaller in later layers."""
    heads = config.num_attention_heads
    factor = 1 - layer / (config.num_hidden_layers - 1 + 1e-5) + 1e-5
    return tuple(2 ** (-8 / heads * (head + 1)) * factor for head in range(heads))


_ATTENTION = LAYER + "self_attn."
_LIGHTNING: Table = {
    "layers.{i}.mixer.qkv": Rows(_ATTENTION + "qkv_proj.weight", axes=3),
    "layers.{i}.mixer.norm": Rows(_ATTENTION + "norm.weight", axes=2),
    "layers.{i}.mixer.gate": Rows(_ATTENTION + "output_gate.weight", axes=2),
    "layers.{i}.mixer.out": Projection(_ATTENTION + "out_proj.weight"),
}
_EXPERTS = either(
    moe_tensors(router="block_sparse_moe.gate", experts="block_sparse_moe.experts", names=("w1", "w3", "w2")),
    moe_tensors(),
)
_BUFFERS = r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$"  # these follow from the config


def _verify(spec: DecoderSpec, tensors: Mapping[str, Any]) -> None:
    """Decays are computed here, so a checkpoint that brings others cannot be served."""
    for i, layer in enumerate(spec.layers):
        name = f"model.layers.{i}.self_attn.slope_rate"
        if isinstance(layer.mixer, LightningSpec) and name in tensors:
            got = tensors[name].read(tuple(slice(0, n) for n in tensors[name].shape)).astype(np.float32).ravel()
            if got.shape != (layer.mixer.num_heads,) or not np.allclose(got, layer.mixer.decays, rtol=1e-2, atol=1e-6):
                raise ModelLoadError(f"tensor {name} holds decays of its own, which is not supported; the config gives others")


ARCHITECTURES = (
    Architecture(
        name="MiniMaxForCausalLM",
        model_type="minimax",
        spec=_minimax,
        tensors=either(tensors(), _LIGHTNING) | _EXPERTS,
        spare=_BUFFERS,
        verify=_verify,
    ),
)
