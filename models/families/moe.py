"""Llama-like models with experts: Mixtral, Qwen, OLMoE, PhiMoE, Granite, ERNIE, Hunyuan, MiniMax M2, DBRX, AFMoE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Halves, Projection, Same
from jaxserve.models.families.from_config import (
    activation,
    attention,
    decoder,
    flags,
    layer_norm,
    mlp,
    one_window,
    rms,
    windows,
)
from jaxserve.models.families.llama import (
    BIASES,
    HUNYUAN,
    LLAMA,
    granite_multipliers,
    hunyuan_attention,
    hunyuan_rope,
    llama_like,
)
from jaxserve.models.families.moe_assembly import FusedDown, FusedUp, StackedRows
from jaxserve.models.families.olmo import OLMO2
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, layer_norms, moe_tensors, tensors
from jaxserve.models.spec import DecoderSpec, MlpSpec, MoeSpec, RopeSpec, RouterSpec


def experts(
    config: HfConfig, num: int, top_k: int, router: RouterSpec, *, dim: int | None = None, bias: bool = False, **changes: Any
) -> MoeSpec:
    """Experts with gated blocks of the config's activation."""
    return MoeSpec(num_experts=num, top_k=top_k, expert=mlp(config, dim, bias=bias), router=router, **changes)


def _mixtral(config: HfConfig) -> DecoderSpec:
    block = experts(config, config.num_local_experts, config.num_experts_per_tok, RouterSpec())
    return llama_like(config, windows=one_window(config), mlp_spec=lambda i: block)


def _phimoe(config: HfConfig) -> DecoderSpec:
    router = RouterSpec(scores="sparsemixer", jitter=config.router_jitter_noise)
    block = experts(config, config.num_local_experts, config.num_experts_per_tok, router)
    return llama_like(
        config,
        norm=layer_norm(config.rms_norm_eps),
        ropes=[_phimoe_rope(config)] * config.num_hidden_layers,
        windows=one_window(config),
        **flags(config, BIASES),
        mlp_spec=lambda i: block,
        decoder_fields={"head_bias": bool(config.lm_head_bias)},
    )


def _phimoe_rope(config: HfConfig) -> RopeSpec:
    """Where it is scaled, cos and sin have a factor of their own instead of the attention factor."""
    parameters = dict(config.rope_parameters)
    short = parameters.pop("short_mscale", None)
    long = parameters.pop("long_mscale", None)
    if parameters.get("rope_type", "default") == "default":
        return rope(config, parameters)
    if parameters["rope_type"] != "longrope" or short is None or long is None:
        raise ModelLoadError(f"phimoe with rope_parameters {parameters} is not supported; jaxserve can do default and longrope")
    return rope(config, parameters | {"attention_factor": short, "long_attention_factor": long})


def sparse_layers(config: HfConfig, block: MoeSpec) -> Callable[[int], MlpSpec | MoeSpec]:
    """Qwen's: every decoder_sparse_step-th layer has experts, but for those named in mlp_only_layers."""
    step, dense = config.decoder_sparse_step, mlp(config)
    return lambda i: block if i not in config.mlp_only_layers and (i + 1) % step == 0 else dense


def by_type(config: HfConfig, block: MoeSpec, dense: MlpSpec | None = None) -> Callable[[int], MlpSpec | MoeSpec]:
    """Experts where mlp_layer_types says sparse; elsewhere `dense`, or the config's own block."""
    types, dense = config.mlp_layer_types, mlp(config) if dense is None else dense
    if len(types) != config.num_hidden_layers or set(types) - {"dense", "sparse"}:
        raise ModelLoadError(f"mlp_layer_types must name dense or sparse for each layer; got {types}")
    return lambda i: block if types[i] == "sparse" else dense


def _mellum(config: HfConfig) -> DecoderSpec:
    router, dim = RouterSpec(normalize=bool(config.norm_topk_prob)), config.moe_intermediate_size
    block = experts(config, config.num_local_experts, config.num_experts_per_tok, router, dim=dim)
    return llama_like(
        config,
        windows=windows(config),
        ropes=[rope(config, config.rope_parameters[kind]) for kind in config.layer_types],
        **flags(config, BIASES),
        qk_norm=rms(config),
        mlp_spec=by_type(config, block),
    )


def _qwen2_moe(config: HfConfig) -> DecoderSpec:
    block = experts(
        config,
        config.num_experts,
        config.num_experts_per_tok,
        RouterSpec(normalize=bool(config.norm_topk_prob)),
        dim=config.moe_intermediate_size,
        shared=mlp(config, config.shared_expert_intermediate_size),
        shared_gate=True,
    )
    bias = bool(config.qkv_bias)
    return llama_like(config, windows=windows(config), qkv_bias=bias, mlp_spec=sparse_layers(config, block))


def _qwen3_moe(config: HfConfig) -> DecoderSpec:
    router, dim = RouterSpec(normalize=bool(config.norm_topk_prob)), config.moe_intermediate_size
    block = experts(config, config.num_local_experts, config.num_experts_per_tok, router, dim=dim)
    return llama_like(
        config,
        windows=one_window(config),
        **flags(config, BIASES),
        qk_norm=rms(config),
        mlp_spec=sparse_layers(config, block),
    )


def _olmoe(config: HfConfig) -> DecoderSpec:
    router = RouterSpec(normalize=bool(config.norm_topk_prob))
    block = experts(config, config.num_experts, config.num_experts_per_tok, router)
    norm, is_flex = rms(config), config.model_type == "flex_olmo"
    return llama_like(
        config,
        **flags(config, BIASES),
        qk_norm=norm,
        qk_norm_over="all_heads",
        clip=None if is_flex else config.clip_qkv,
        mlp_spec=lambda i: block,
        decoder_fields={"norm_placement": "post" if is_flex else "pre"},
    )


def granite_experts(config: HfConfig) -> MoeSpec:
    dim = getattr(config, "shared_intermediate_size", 0)
    shared = mlp(config, dim) if dim else None
    return experts(config, config.num_local_experts, config.num_experts_per_tok, RouterSpec(), shared=shared)


def _granitemoe(config: HfConfig) -> DecoderSpec:
    block = granite_experts(config)
    return llama_like(
        config,
        **flags(config, BIASES),
        scale=float(config.attention_multiplier),
        mlp_spec=lambda i: block,
        decoder_fields=granite_multipliers(config),
    )


def _ernie_moe(config: HfConfig) -> DecoderSpec:
    bias, shared = bool(config.use_bias), config.moe_num_shared_experts
    dim = config.moe_intermediate_size
    block = experts(
        config,
        config.moe_num_experts,
        config.moe_k,
        RouterSpec(choice_bias=True, norm_min=config.moe_norm_min),
        dim=dim,
        shared=mlp(config, dim * shared, bias=bias) if shared > 0 else None,
    )
    dense = mlp(config, bias=bias)

    def is_sparse(i: int) -> bool:
        in_range = config.moe_layer_start_index <= i <= config.moe_layer_end_index
        return bool(in_range and (i + 1) % config.moe_layer_interval == 0)

    return llama_like(
        config,
        ropes=[rope(config, interleaved=True)] * config.num_hidden_layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_spec=lambda i: block if is_sparse(i) else dense,
        decoder_fields={"head_bias": bias},
    )


def _hunyuan_moe(config: HfConfig) -> DecoderSpec:
    def of_layer(value: Any, i: int) -> int:
        return int(value if isinstance(value, int) else value[i])

    def block(i: int) -> MoeSpec:
        num, top_k = of_layer(config.num_experts, i), of_layer(config.moe_topk, i)
        return experts(config, num, top_k, RouterSpec(), shared=mlp(config))

    ropes = [hunyuan_rope(config)] * config.num_hidden_layers
    return llama_like(config, ropes=ropes, **hunyuan_attention(config), mlp_spec=block)


def _minimax_m2(config: HfConfig) -> DecoderSpec:
    router = RouterSpec(scores="sigmoid", choice_bias=True)
    block = experts(config, config.num_local_experts, config.num_experts_per_tok, router)
    return llama_like(
        config,
        ropes=[rope(config, is_partial=True)] * config.num_hidden_layers,
        qk_norm=rms(config),
        qk_norm_over="all_heads",
        mlp_spec=lambda i: block,
    )


def _dbrx(config: HfConfig) -> DecoderSpec:
    own, ffn = config.attn_config, config.ffn_config
    power = ffn.moe_normalize_expert_weights
    if power not in (None, 1):
        raise ModelLoadError(f"dbrx with moe_normalize_expert_weights={power} is not supported; jaxserve can do 1 and None")
    expert = MlpSpec(dim=ffn.ffn_hidden_size, activation=activation(ffn.ffn_act_fn.get("name", "silu")))
    router = RouterSpec(normalize=power is not None)
    block = MoeSpec(num_experts=ffn.moe_num_experts, top_k=ffn.moe_top_k, expert=expert, router=router)
    dim = config.hidden_size // config.num_attention_heads
    mixer = attention(config, rope(config, dim=dim), num_kv_heads=own.kv_n_heads, clip=own.clip_qkv)
    norm = layer_norm(1e-5, bias=False)
    return decoder(config, norm, lambda i: mixer, block)


def _afmoe(config: HfConfig) -> DecoderSpec:
    window, position = windows(config), rope(config)
    dim, shared = config.moe_intermediate_size, config.num_shared_experts
    router = RouterSpec(scores="sigmoid", choice_bias=True, norm_eps=1e-20, scale=float(config.route_scale))
    block = experts(config, config.num_experts, config.num_experts_per_tok, router, dim=dim, shared=mlp(config, dim * shared))
    dense = mlp(config)
    return llama_like(
        config,
        windows=window,
        ropes=[None if seen is None else position for seen in window],
        **flags(config, BIASES),
        qk_norm=rms(config),
        out_gate=True,
        mlp_spec=lambda i: dense if i < config.num_dense_layers else block,
        decoder_fields={
            "norm_placement": "sandwich",
            "embed_scale": config.hidden_size**0.5 if config.mup_enabled else None,
        },
    )


_W = ("w1", "w3", "w2")
_MIXTRAL = LLAMA | moe_tensors(router="block_sparse_moe.gate", experts="block_sparse_moe.experts", names=_W)
_MINIMAX_M2 = (
    OLMO2
    | layer_norms(mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    | moe_tensors(
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        names=_W,
        choice_bias="block_sparse_moe.e_score_correction_bias",
    )
)
_QWEN = LLAMA | moe_tensors(shared="mlp.shared_expert")
_OLMOE = OLMO2 | moe_tensors()
_PRE_OLMOE = _OLMOE | layer_norms(mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm")
_GRANITE_SHARED: Table = {
    "layers.{i}.mlp.shared.up": Halves(f"{LAYER}shared_mlp.input_linear.weight"),
    "layers.{i}.mlp.shared.down": Projection(f"{LAYER}shared_mlp.output_linear.weight"),
}
_GRANITE = (
    LLAMA
    | moe_tensors(router="block_sparse_moe.router.layer")
    | {
        "layers.{i}.mlp.experts_up": FusedUp(f"{LAYER}block_sparse_moe.input_linear.weight"),
        "layers.{i}.mlp.experts_down": FusedDown(f"{LAYER}block_sparse_moe.output_linear.weight"),
    }
    | _GRANITE_SHARED
)
GRANITE_MOE_SWA = LLAMA | moe_tensors(router="block_sparse_moe.router", experts="block_sparse_moe.experts") | _GRANITE_SHARED
_ERNIE = (
    LLAMA
    | moe_tensors()
    | {"layers.{i}.mlp.choice_bias": Same(f"{LAYER}mlp.moe_statics.e_score_correction_bias", lambda shape: (1, *shape))}
)
_HUNYUAN_MOE = HUNYUAN | moe_tensors(router="mlp.gate.wg", shared="mlp.shared_mlp")
_BLOCK = "transformer.blocks.{i}."
_DBRX = tensors(
    layer=_BLOCK,
    embed="transformer.wte",
    final_norm="transformer.norm_f",
    mixer_norm="norm_attn_norm.norm_1",
    mlp_norm="norm_attn_norm.norm_2",
    qkv=("norm_attn_norm.attn.Wqkv",),
    layout="concatenated",
    out="norm_attn_norm.attn.out_proj",
) | {
    **moe_tensors(layer=_BLOCK, router="ffn.router.layer"),
    "layers.{i}.mlp.experts_up": StackedRows((f"{_BLOCK}ffn.experts.mlp.w1", f"{_BLOCK}ffn.experts.mlp.v1")),
    "layers.{i}.mlp.experts_down": StackedRows((f"{_BLOCK}ffn.experts.mlp.w2",)),
}
_AFMOE = (
    LLAMA
    | layer_norms(mixer_out_norm="post_attention_layernorm", mlp_norm="pre_mlp_layernorm", mlp_out_norm="post_mlp_layernorm")
    | moe_tensors(router="mlp.router.gate", choice_bias="mlp.expert_bias")
    | {"layers.{i}.mixer.gate": Projection(f"{LAYER}self_attn.gate_proj.weight", num_inputs=1)}
)

ARCHITECTURES = tuple(
    Architecture(name=name, model_type=model_type, spec=spec, tensors=table)
    for name, model_type, spec, table in (
        ("MixtralForCausalLM", "mixtral", _mixtral, _MIXTRAL),
        ("PhimoeForCausalLM", "phimoe", _phimoe, _MIXTRAL),
        ("Qwen2MoeForCausalLM", "qwen2_moe", _qwen2_moe, _QWEN),
        ("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe, _QWEN),
        ("MellumForCausalLM", "mellum", _mellum, _QWEN),
        ("OlmoeForCausalLM", "olmoe", _olmoe, _PRE_OLMOE),
        ("FlexOlmoForCausalLM", "flex_olmo", _olmoe, _OLMOE),
        ("GraniteMoeForCausalLM", "granitemoe", _granitemoe, _GRANITE),
        ("GraniteMoeSharedForCausalLM", "granitemoeshared", _granitemoe, _GRANITE),
        ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", _ernie_moe, _ERNIE),
        ("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", _hunyuan_moe, _HUNYUAN_MOE),
        ("MiniMaxM2ForCausalLM", "minimax_m2", _minimax_m2, _MINIMAX_M2),
        ("DbrxForCausalLM", "dbrx", _dbrx, _DBRX),
        ("AfmoeForCausalLM", "afmoe", _afmoe, _AFMOE),
    )
)
