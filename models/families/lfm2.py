"""LFM2: short convolutions, and attention in some layers; dense or with experts."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same
from jaxserve.models.families.from_config import attention, decoder, layer_types
from jaxserve.models.families.recurrent_tensors import ConvRows, Rows, either
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors, tensors
from jaxserve.models.recurrent_spec import ShortConvSpec
from jaxserve.models.spec import DecoderSpec, MixerSpec, MlpSpec, MoeSpec, NormSpec, RouterSpec


def _decoder(config: HfConfig, blocks: list[MlpSpec | MoeSpec]) -> DecoderSpec:
    """blocks: of each layer."""
    norm = NormSpec(eps=config.norm_eps)
    mixers: dict[str, MixerSpec] = {
        "full_attention": attention(config, rope(config), qk_norm=norm),
        "conv": ShortConvSpec(conv_kernel=config.conv_L_cache, bias=bool(config.conv_bias)),
    }
    kinds = layer_types(config, *mixers)
    return decoder(config, norm, lambda i: mixers[kinds[i]], lambda i: blocks[i])


def _lfm2(config: HfConfig) -> DecoderSpec:
    dim = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        dim = int(2 * dim / 3)
        if config.block_ffn_dim_multiplier is not None:
            multiple = config.block_multiple_of
            dim = multiple * -(-int(config.block_ffn_dim_multiplier * dim) // multiple)
    return _decoder(config, [MlpSpec(dim=dim, activation="silu")] * config.num_hidden_layers)


def _lfm2_moe(config: HfConfig) -> DecoderSpec:
    block = MoeSpec(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        expert=MlpSpec(dim=config.moe_intermediate_size, activation="silu"),
        router=RouterSpec(
            scores="sigmoid",
            choice_bias=bool(config.use_expert_bias),
            normalize=bool(config.norm_topk_prob),
            norm_eps=1e-6,
            scale=config.routed_scaling_factor,
        ),
    )
    dense = MlpSpec(dim=config.intermediate_size, activation="silu")
    return _decoder(config, [dense if i < config.num_dense_layers else block for i in range(config.num_hidden_layers)])


_CONV: Table = {
    "layers.{i}.mixer.into": Rows(LAYER + "conv.in_proj.weight", axes=2),
    "layers.{i}.mixer.into_bias": Rows(LAYER + "conv.in_proj.bias", axes=2),
    "layers.{i}.mixer.conv": ConvRows(LAYER + "conv.conv.weight"),
    "layers.{i}.mixer.conv_bias": Same(LAYER + "conv.conv.bias"),
    "layers.{i}.mixer.out": Projection(LAYER + "conv.out_proj.weight"),
    "layers.{i}.mixer.out_bias": Same(LAYER + "conv.out_proj.bias"),
}
_TENSORS = either(
    tensors(
        final_norm="model.embedding_norm",
        mixer_norm="operator_norm",
        mlp_norm="ffn_norm",
        out="self_attn.out_proj",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        up=("feed_forward.w1", "feed_forward.w3"),
        down="feed_forward.w2",
    ),
    _CONV,
)
_EXPERTS = moe_tensors(
    router="feed_forward.gate",
    experts="feed_forward.experts",
    names=("w1", "w3", "w2"),
    choice_bias="feed_forward.expert_bias",
)

ARCHITECTURES = (
    Architecture(name="Lfm2ForCausalLM", model_type="lfm2", spec=_lfm2, tensors=_TENSORS),
    Architecture(name="Lfm2MoeForCausalLM", model_type="lfm2_moe", spec=_lfm2_moe, tensors=_TENSORS | _EXPERTS),
)
