"""Models with rope and layer normalisation: Cohere, StableLM, StarCoder 2, Nemotron, Persimmon, Jais 2, Phi."""

from __future__ import annotations

from typing import Any

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import flags, layer_norm, one_window, windows
from jaxserve.models.families.llama import BIASES, LLAMA, llama_like
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import head_norms, tensors
from jaxserve.models.spec import DecoderSpec


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


def _partial(config: HfConfig) -> list[Any]:
    return [rope(config, is_partial=True)] * config.num_hidden_layers


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
    return llama_like(config, norm=norm, ropes=_partial(config), **flags(config, BIASES), mlp_fields=plain)


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
        ("StableLmForCausalLM", "stablelm", _stablelm, _STABLELM),
        ("Starcoder2ForCausalLM", "starcoder2", _starcoder2, tensors(up=("mlp.c_fc",), down="mlp.c_proj")),
        ("NemotronForCausalLM", "nemotron", _nemotron, _NEMOTRON),
        ("Jais2ForCausalLM", "jais2", _jais2, _NEMOTRON),
        ("PersimmonForCausalLM", "persimmon", _persimmon, _PERSIMMON),
        ("PhiForCausalLM", "phi", _phi, _PHI),
    )
)
