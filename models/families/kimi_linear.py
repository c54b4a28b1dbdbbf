"""Kimi Linear and Ling 3: Kimi delta attention, latent attention in some layers, DeepSeek V3's experts."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same
from jaxserve.models.families.deepseek import MLA, latent_attention, mla_tensors, sigmoid_experts
from jaxserve.models.families.from_config import activation, decoder, layer_types, refuse, rms
from jaxserve.models.families.llama import LLAMA
from jaxserve.models.families.moe import by_type
from jaxserve.models.families.recurrent_tensors import ConvRows, Joined, Rows, either
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors, tensors
from jaxserve.models.recurrent_spec import KimiDeltaSpec
from jaxserve.models.spec import DecoderSpec, MixerSpec, MlaSpec, NormSpec


def _kimi_linear(config: HfConfig) -> DecoderSpec:
    refuse(config, mla_use_nope=True, moe_router_activation_func="sigmoid", moe_layer_freq=1)
    mixers: dict[str, MixerSpec] = {
        "full_attention": MlaSpec(
            num_heads=config.num_attention_heads,
            q_rank=config.q_lora_rank,
            kv_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            v_dim=config.v_head_dim,
            scale=float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5),
            rope=None,
            latent_norm=NormSpec(eps=1e-6),  # whatever rms_norm_eps is
            bias=bool(config.attention_bias),
        ),
        "linear_attention": KimiDeltaSpec(
            num_heads=config.linear_num_heads,
            head_dim=config.linear_head_dim,
            rank=config.linear_head_dim,
            conv_kernel=config.linear_conv_kernel_dim,
            activation=activation(config.hidden_act),
            norm_eps=config.rms_norm_eps,
        ),
    }
    return _hybrid(config, mixers)


def _ling3(config: HfConfig) -> DecoderSpec:
    """Without a low rank: decays that have a floor, and a gate for each head of latent attention."""
    mixers: dict[str, MixerSpec] = {
        "full_attention": latent_attention(config, interleaved=True, q_rank=None, out_gate=True),
        "linear_attention": KimiDeltaSpec(
            num_heads=config.linear_num_heads,
            head_dim=config.linear_head_dim,
            rank=None,
            conv_kernel=config.linear_conv_kernel_dim,
            activation=activation(config.hidden_act),
            norm_eps=config.rms_norm_eps,
            decay_floor=float(config.kda_lower_bound) if config.kda_safe_gate else None,
        ),
    }
    return _hybrid(config, mixers)


def _hybrid(config: HfConfig, mixers: dict[str, MixerSpec]) -> DecoderSpec:
    kinds = layer_types(config, *mixers)
    block = sigmoid_experts(config, config.num_local_experts, config.n_shared_experts)
    return decoder(config, rms(config), lambda i: mixers[kinds[i]], by_type(config, block))


_MIXER = "layers.{i}.mixer."


def _delta(attention: str) -> Table:
    """Kimi delta attention; `attention` is what its tensors' names begin with."""
    return {
        _MIXER + "qkv": Joined(tuple(Rows(f"{attention}{name}_proj.weight", axes=2) for name in "qkv"), axis=-3),
        _MIXER + "conv": Joined(tuple(ConvRows(f"{attention}{name}_conv1d.weight", axes=2) for name in "qkv"), axis=-3),
        _MIXER + "beta": Projection(f"{attention}b_proj.weight"),
        _MIXER + "dt_bias": Rows(f"{attention}dt_bias", axes=2),
        _MIXER + "norm": Same(f"{attention}o_norm.weight"),
    }


_ATTENTION = LAYER + "self_attn."
_KIMI = _delta(_ATTENTION) | {
    _MIXER + "decay_in": Projection(f"{_ATTENTION}f_a_proj.weight"),
    _MIXER + "decay_out": Rows(f"{_ATTENTION}f_b_proj.weight", axes=2),
    _MIXER + "gate_in": Projection(f"{_ATTENTION}g_a_proj.weight"),
    _MIXER + "gate_out": Rows(f"{_ATTENTION}g_b_proj.weight", axes=2),
    _MIXER + "a_log": Same(f"{_ATTENTION}A_log", lambda shape: (1, 1, *shape, 1)),
}
_EXPERTS = moe_tensors(
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    names=("w1", "w3", "w2"),
    shared="block_sparse_moe.shared_experts",
)
_LING_ATTENTION = LAYER + "attention."
_LING = (
    tensors(embed="model.word_embeddings", out="attention.dense")
    | moe_tensors(choice_bias="mlp.gate.expert_bias")
    | mla_tensors(_LING_ATTENTION)
    | _delta(_LING_ATTENTION)
    | {
        _MIXER + "gate": Projection(f"{_LING_ATTENTION}g_proj.weight"),
        _MIXER + "decay_out": Rows(f"{_LING_ATTENTION}f_proj.weight", axes=2),
        _MIXER + "gate_out": Rows(f"{_LING_ATTENTION}g_proj.weight", axes=2),
        _MIXER + "a_log": Same(f"{_LING_ATTENTION}A_log"),
    }
)
# A dense block is mlp in published checkpoints; transformers saves it as block_sparse_moe.
_BLOCK = tensors(up=("block_sparse_moe.gate_proj", "block_sparse_moe.up_proj"), down="block_sparse_moe.down_proj")

ARCHITECTURES = (
    Architecture(
        name="BailingHybridForCausalLM",
        model_type="bailing_hybrid",
        spec=_ling3,
        tensors=_LING,
        spare=r"^model\.layers\.42\.",  # predicts several tokens at once
    ),
    Architecture(
        name="KimiLinearForCausalLM",
        model_type="kimi_linear",
        spec=_kimi_linear,
        tensors=either(LLAMA, _BLOCK) | MLA | _KIMI | _EXPERTS,
    ),
)
