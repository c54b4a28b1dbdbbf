"""LFM2 and LFM3: short convolutions, and attention in some layers; dense or with experts."""

from __future__ import annotations

from functools import partial

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same
from jaxserve.models.families.from_config import attention, decoder, flags, head_dim, layer_types
from jaxserve.models.families.llama import BIASES
from jaxserve.models.families.recurrent_tensors import ConvRows, Rows, either
from jaxserve.models.families.rope_config import proportional_rope, rope
from jaxserve.models.families.tensors import LAYER, Table, layer_norms, moe_tensors, tensors
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


def _lfm3(config: HfConfig) -> DecoderSpec:
    """Also with windows and a gate for each head; most often with norms behind the mixers and blocks as well."""
    norm, kinds = NormSpec(eps=config.norm_eps), layer_types(config, "full_attention", "sliding_attention", "conv")
    if "sliding_attention" in kinds and not config.sliding_window:
        raise ModelLoadError(f"layer_types has sliding_attention, but sliding_window is {config.sliding_window!r}")

    def heads(kind: str) -> MixerSpec:
        return attention(
            config,
            proportional_rope(config, config.rope_parameters[kind], head_dim(config)),
            window=config.sliding_window if kind == "sliding_attention" else None,
            **flags(config, BIASES),
            qk_norm=norm,
            out_gate=bool(config.use_attention_gate),
            gate_per_head=True,
        )

    conv = ShortConvSpec(conv_kernel=config.conv_L_cache, bias=bool(config.conv_bias))
    return decoder(
        config,
        norm,
        lambda i: conv if kinds[i] == "conv" else heads(kinds[i]),
        MlpSpec(dim=config.intermediate_size, activation="silu"),
        norm_placement="sandwich" if config.use_sandwich_norm else "pre",
    )


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
_tensors = partial(
    tensors,
    final_norm="model.embedding_norm",
    mixer_norm="operator_norm",
    mlp_norm="ffn_norm",
    up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
)
_TENSORS = either(
    _tensors(out="self_attn.out_proj", q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"),
    _CONV,
)
_LFM3 = (
    either(_tensors(), _CONV)
    | layer_norms(mixer_out_norm="post_operator_norm", mlp_out_norm="post_ffn_norm")
    | {"layers.{i}.mixer.gate": Projection(LAYER + "self_attn.gate_proj.weight")}
)
_EXPERTS = moe_tensors(
    router="feed_forward.gate",
    experts="feed_forward.experts",
    names=("w1", "w3", "w2"),
    choice_bias="feed_forward.expert_bias",
)

ARCHITECTURES = (
    Architecture(name="Lfm2ForCausalLM", model_type="lfm2", spec=_lfm2, tensors=_TENSORS),
    Architecture(name="Lfm3ForCausalLM", model_type="lfm3", spec=_lfm3, tensors=_LFM3),
    Architecture(name="Lfm2MoeForCausalLM", model_type="lfm2_moe", spec=_lfm2_moe, tensors=_TENSORS | _EXPERTS),
)
