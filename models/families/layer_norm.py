"""Models with rope and layer normalisation: Cohere, StableLM, StarCoder 2, Nemotron, Persimmon, Jais 2, Phi."""

from __future__ import annotations

from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import flags, layer_norm, mlp, one_window, refuse, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA, llama_like
from jaxserve.models.families.moe import by_type, experts
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import head_norms, moe_tensors, tensors
from jaxserve.models.spec import DecoderSpec, RouterSpec


def _cohere(config: HfConfig) -> DecoderSpec:
    norm = layer_norm(config.layer_norm_eps, bias=False)
    return llama_like(
        config,
        norm=norm,
        ropes=[rope(config, interleaved=True)] * config.num_hidden_layers,
        **flags(config, BIASES),
        qk_norm=norm if config.use_qk_norm else None,
        qk_norm_over="each_head",
        decoder_fields={"norm_placement": "parallel_shared", "logit_multiplier": config.logit_scale},
    )


def _cohere2(config: HfConfig) -> DecoderSpec:
    window, position = windows(config), rope(config, interleaved=True)
    return llama_like(
        config,
        norm=layer_norm(config.layer_norm_eps, bias=False),
        windows=window,
        ropes=[None if seen is None else position for seen in window],
        **flags(config, BIASES),
        decoder_fields={"norm_placement": "parallel_shared", "logit_multiplier": config.logit_scale},
    )


def _cohere2_moe(config: HfConfig) -> DecoderSpec:
    """As Cohere 2, with experts behind some dense layers; the average of experts and shared expert is half of each."""
    window, position = windows(config), rope(config, interleaved=True)
    types, has_rope = config.mlp_layer_types, config.prefix_dense_sliding_window_pattern == 1
    if config.expert_selection_fn not in ("softmax", "sigmoid"):
        raise ModelLoadError(
            f"expert_selection_fn {config.expert_selection_fn!r} is not supported; jaxserve can do softmax, sigmoid"
        )
    if config.shared_expert_combination_strategy not in ("average", "sum"):
        refuse(config, shared_expert_combination_strategy="average")
    shared = config.num_shared_experts * config.intermediate_size
    share = 0.5 if shared and config.shared_expert_combination_strategy == "average" else 1.0
    is_softmax = config.expert_selection_fn == "softmax"
    router = RouterSpec(
        scores="softmax" if is_softmax else "sigmoid", normalize=is_softmax or bool(config.norm_topk_prob), scale=share
    )
    behind = mlp(config, shared, out_multiplier=share) if shared else None
    block = experts(config, config.num_experts, config.num_experts_per_tok, router, shared=behind)
    return llama_like(
        config,
        norm=layer_norm(config.layer_norm_eps, bias=False) if config.rms_norm_eps is None else rms(config),
        windows=window,
        ropes=[position if seen is not None or (has_rope and types[i] == "dense") else None for i, seen in enumerate(window)],
        **flags(config, BIASES),
        mlp_spec=by_type(config, block, mlp(config, config.prefix_dense_intermediate_size)),
        decoder_fields={"norm_placement": "parallel_shared", "logit_multiplier": config.logit_scale},
    )


def _partial(config: HfConfig) -> list[Any]:
    return [rope(config, is_partial=True, is_even=True)] * config.num_hidden_layers


def _stablelm(config: HfConfig) -> DecoderSpec:
    return llama_like(
        config,
        norm=layer_norm(config.layer_norm_eps),
        ropes=_partial(config),
        qkv_bias=bool(config.use_qkv_bias),
        qk_norm=layer_norm(config.layer_norm_eps, bias=False) if config.qk_layernorm else None,
        qk_norm_over="each_head",
        decoder_fields={"norm_placement": "parallel_shared" if config.use_parallel_residual else "pre"},
    )


def _starcoder2(config: HfConfig) -> DecoderSpec:
    bias, norm = bool(config.use_bias), layer_norm(config.norm_epsilon)
    plain: dict[str, Any] = {"gated": False, "bias": bias}
    return llama_like(config, norm=norm, windows=one_window(config), qkv_bias=bias, out_bias=bias, mlp_fields=plain)


def _nemotron(config: HfConfig) -> DecoderSpec:
    norm = layer_norm(config.norm_eps, unit_offset=True)
    plain: dict[str, Any] = {"gated": False} | flags(config, {"bias": "mlp_bias"})
    ropes = [rope(config, is_partial=True)] * config.num_hidden_layers
    return llama_like(config, norm=norm, ropes=ropes, **flags(config, BIASES), mlp_fields=plain)


def _jais2(config: HfConfig) -> DecoderSpec:
    plain: dict[str, Any] = {"gated": False} | flags(config, {"bias": "mlp_bias"})
    return llama_like(config, norm=layer_norm(config.layer_norm_eps), **flags(config, BIASES), mlp_fields=plain)


def _persimmon(config: HfConfig) -> DecoderSpec:
    norm = layer_norm(config.layer_norm_eps)
    return llama_like(
        config,
        norm=norm,
        ropes=_partial(config),
        qkv_bias=True,
        out_bias=True,
        qk_norm=norm if config.qk_layernorm else None,
        num_kv_heads=config.num_attention_heads,
        mlp_fields={"gated": False, "bias": True},
    )


def _phi(config: HfConfig) -> DecoderSpec:
    norm = layer_norm(config.layer_norm_eps)
    return llama_like(
        config,
        norm=norm,
        ropes=_partial(config),
        qkv_bias=True,
        out_bias=True,
        qk_norm=norm if config.qk_layernorm else None,
        mlp_fields={"gated": False, "bias": True},
        decoder_fields={"norm_placement": "parallel_shared", "head_bias": True},
    )


_STABLELM = LLAMA | head_norms("self_attn.q_layernorm.norms.{h}.weight", "self_attn.k_layernorm.norms.{h}.weight", "apart")
_COHERE = LLAMA | head_norms("self_attn.q_norm.weight", "self_attn.k_norm.weight", "heads")
_NEMOTRON = tensors(up=("mlp.up_proj",))
_QK: dict[str, Any] = {"q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm"}
_PERSIMMON = tensors(
    final_norm="model.final_layernorm",
    qkv=("self_attn.query_key_value",),
    layout="grouped",
    out="self_attn.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    **_QK,
)
_PHI = tensors(final_norm="model.final_layernorm", out="self_attn.dense", up=("mlp.fc1",), down="mlp.fc2", **_QK)

ARCHITECTURES = tuple(
    Architecture(name=name, model_type=model_type, spec=spec, tensors=table)
    for name, model_type, spec, table in (
        ("CohereForCausalLM", "cohere", _cohere, _COHERE),
        ("Cohere2ForCausalLM", "cohere2", _cohere2, LLAMA),
        ("Cohere2MoeForCausalLM", "cohere2_moe", _cohere2_moe, LLAMA | moe_tensors()),
        ("StableLmForCausalLM", "stablelm", _stablelm, _STABLELM),
        ("Starcoder2ForCausalLM", "starcoder2", _starcoder2, tensors(up=("mlp.c_fc",), down="mlp.c_proj")),
        ("NemotronForCausalLM", "nemotron", _nemotron, _NEMOTRON),
        ("Jais2ForCausalLM", "jais2", _jais2, _NEMOTRON),
        ("PersimmonForCausalLM", "persimmon", _persimmon, _PERSIMMON),
        ("PhiForCausalLM", "phi", _phi, _PHI),
    )
)
