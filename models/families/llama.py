"""Llama 2 and 3, and those that differ from them by a field or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Derived
from jaxserve.models.families.from_config import (
    attention,
    decoder,
    flags,
    head_dim,
    mlp,
    one_window,
    refuse,
    rms,
    windows,
)
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, layer_norms, norm_tensors, tensors
from jaxserve.models.spec import DecoderSpec, FactorScaling, NormSpec, RopeSpec, TemperatureSpec

BIASES = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}


def llama_like(
    config: HfConfig,
    *,
    norm: NormSpec | None = None,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[RopeSpec | None] | None = None,
    mlp_fields: dict[str, Any] | None = None,
    mlp_spec: Callable[[int], Any] | None = None,
    decoder_fields: dict[str, Any] | None = None,
    **attention_fields: Any,
) -> DecoderSpec:
    """A pre-norm decoder with a gated mlp and rope, unless something else is said.

    Args:
        windows, ropes: of each layer; by default none, and the config's in every layer.
        mlp_fields, decoder_fields, attention_fields: of the specs.
        mlp_spec: of each layer, from its number, instead of mlp_fields.
    """
    norm = rms(config) if norm is None else norm
    every_rope = rope(config) if ropes is None else None
    return decoder(
        config,
        norm,
        lambda i: attention(
            config,
            every_rope if ropes is None else ropes[i],
            window=None if windows is None else windows[i],
            **attention_fields,
        ),
        mlp(config, **(mlp_fields or {})) if mlp_spec is None else mlp_spec,
        **(decoder_fields or {}),
    )


def _llama(config: HfConfig) -> DecoderSpec:
    return llama_like(config, **flags(config, BIASES), mlp_fields=flags(config, {"bias": "mlp_bias"}))


def _mistral(config: HfConfig) -> DecoderSpec:
    refuse(config, layer_types=None)  # some are Ministral under Mistral's name: other windows in other layers
    return llama_like(config, windows=one_window(config))


def _ministral(config: HfConfig) -> DecoderSpec:
    return llama_like(config, windows=windows(config))


def _ministral3(config: HfConfig) -> DecoderSpec:
    own = ("llama_4_scaling_beta", "max_position_embeddings")
    position, parameters = rope(config, read_elsewhere=own), config.rope_parameters
    temperature = None
    if parameters.get("llama_4_scaling_beta"):
        length = parameters.get("original_max_position_embeddings")
        if not length:
            raise ModelLoadError("rope_parameters has llama_4_scaling_beta, but no original_max_position_embeddings")
        temperature = TemperatureSpec(scale=parameters["llama_4_scaling_beta"], length=length)
    ropes = [position] * config.num_hidden_layers
    return llama_like(config, windows=one_window(config), ropes=ropes, temperature=temperature)


def _qwen2(config: HfConfig) -> DecoderSpec:
    return llama_like(config, windows=windows(config), qkv_bias=True)


def _qwen3(config: HfConfig) -> DecoderSpec:
    return llama_like(config, windows=windows(config), **flags(config, BIASES), qk_norm=rms(config))


def _arcee(config: HfConfig) -> DecoderSpec:
    bias = flags(config, {"bias": "mlp_bias"})
    return llama_like(config, **flags(config, BIASES), mlp_fields={"gated": False} | bias)


def _every(config: HfConfig, position: RopeSpec) -> list[RopeSpec | None]:
    return [position] * config.num_hidden_layers


def _helium(config: HfConfig) -> DecoderSpec:
    _same_width(config)
    bias = bool(config.attention_bias)
    ropes = _every(config, rope(config, interleaved=True))
    return llama_like(config, ropes=ropes, qkv_bias=bias, mlp_fields=flags(config, {"bias": "mlp_bias"}))


def _same_width(config: HfConfig) -> None:
    if config.num_attention_heads * head_dim(config) != config.hidden_size:
        raise ModelLoadError(
            f"{config.model_type} wants num_attention_heads * head_dim to be hidden_size={config.hidden_size}; "
            f"got {config.num_attention_heads} * {head_dim(config)}"
        )


def _seed_oss(config: HfConfig) -> DecoderSpec:
    biases = {"qkv_bias": "attention_bias", "out_bias": "attention_out_bias"}
    return llama_like(config, **flags(config, biases), mlp_fields=flags(config, {"bias": "mlp_bias"}))


def granite_multipliers(config: HfConfig) -> dict[str, Any]:
    """The factors on embeddings, residuals and logits."""
    return {
        "embed_scale": float(config.embedding_multiplier),
        "residual_multiplier": float(config.residual_multiplier),
        "logit_multiplier": 1 / float(config.logits_scaling),
    }


def _granite(config: HfConfig) -> DecoderSpec:
    return llama_like(
        config,
        **flags(config, BIASES),
        scale=float(config.attention_multiplier),
        mlp_fields=flags(config, {"bias": "mlp_bias"}),
        decoder_fields=granite_multipliers(config),
    )


def _hyperclovax(config: HfConfig) -> DecoderSpec:
    fields = granite_multipliers(config) | {"logit_multiplier": float(config.logits_scaling)}
    return llama_like(
        config,
        **flags(config, BIASES),
        scale=float(config.attention_multiplier),
        mlp_fields=flags(config, {"bias": "mlp_bias"}),
        decoder_fields=fields | {"norm_placement": "sandwich" if config.use_post_norm else "pre"},
    )


def _smollm3(config: HfConfig) -> DecoderSpec:
    has_rope, position = config.no_rope_layers, rope(config)
    if len(has_rope) != config.num_hidden_layers:
        raise ModelLoadError(f"no_rope_layers names {len(has_rope)} layers; num_hidden_layers is {config.num_hidden_layers}")
    return llama_like(
        config,
        windows=windows(config) if config.use_sliding_window else None,
        ropes=[position if has else None for has in has_rope],
        **flags(config, BIASES),
        mlp_fields=flags(config, {"bias": "mlp_bias"}),
    )


def _cwm(config: HfConfig) -> DecoderSpec:
    return llama_like(config, windows=windows(config), mlp_fields=flags(config, {"bias": "mlp_bias"}))


def _ernie(config: HfConfig) -> DecoderSpec:
    bias = bool(config.use_bias)
    ropes = _every(config, rope(config, interleaved=True))
    return llama_like(config, ropes=ropes, qkv_bias=bias, out_bias=bias, mlp_fields={"bias": bias})


def hunyuan_rope(config: HfConfig) -> RopeSpec:
    """Dynamic NTK with a factor that is fixed (alpha) is another base."""
    parameters = dict(config.rope_parameters)
    alpha = parameters.pop("alpha", None)
    if alpha and parameters.get("rope_type") == "dynamic":
        dim = head_dim(config)
        return RopeSpec(theta=float(parameters["rope_theta"]) * alpha ** (dim / (dim - 2)), rotary_dim=dim)
    own = ("alpha", "mscale", "mscale_all_dim", "beta_fast", "beta_slow") if parameters.get("rope_type") == "dynamic" else ()
    return rope(config, parameters, read_elsewhere=own)


def hunyuan_attention(config: HfConfig) -> dict[str, Any]:
    """Fields of its AttentionSpec."""
    return flags(config, BIASES) | {"qk_norm": rms(config), "qk_norm_after_rope": True}


def _hunyuan(config: HfConfig) -> DecoderSpec:
    return llama_like(config, ropes=_every(config, hunyuan_rope(config)), **hunyuan_attention(config))


def _nanochat(config: HfConfig) -> DecoderSpec:
    norm, position = rms(config, gain=False), rope(config)
    if position.scaling is not None:
        raise ModelLoadError(
            f"nanochat with rope_parameters {config.rope_parameters} is not supported; jaxserve can do plain rope"
        )
    backwards = replace(position, scaling=FactorScaling(factors=(-1.0,) * (position.rotary_dim // 2)))
    return llama_like(
        config,
        norm=norm,
        ropes=_every(config, backwards),
        **flags(config, BIASES),
        qk_norm=norm,
        qk_norm_after_rope=True,
        mlp_fields={"gated": False},
        decoder_fields={"embed_norm": norm, "logit_softcap": config.final_logit_softcapping},
    )


def _bitnet(config: HfConfig) -> DecoderSpec:
    _same_width(config)
    norm = rms(config)
    return llama_like(config, **flags(config, BIASES), out_norm=norm, mlp_fields={"hidden_norm": norm})


def _apertus(config: HfConfig) -> DecoderSpec:
    fields: dict[str, Any] = {"gated": False}
    if config.hidden_act == "xielu":
        fields["activation"] = "xielu"
    return llama_like(config, **flags(config, BIASES), qk_norm=rms(config), mlp_fields=fields)


def _glm(config: HfConfig) -> DecoderSpec:
    ropes = _every(config, rope(config, is_partial=True, interleaved=True))
    return llama_like(config, ropes=ropes, qkv_bias=bool(config.attention_bias))


def _glm4(config: HfConfig) -> DecoderSpec:
    ropes = _every(config, rope(config, is_partial=True, interleaved=True))
    placed = {"norm_placement": "sandwich"}
    return llama_like(config, ropes=ropes, qkv_bias=bool(config.attention_bias), decoder_fields=placed)


def _phi3(config: HfConfig) -> DecoderSpec:
    ropes = _every(config, rope(config, is_partial=True))
    return llama_like(config, windows=one_window(config), ropes=ropes)


LLAMA = tensors()
_FUSED_UP = tensors(gate_up="mlp.gate_up_proj")
_GLM4 = _FUSED_UP | layer_norms(
    mixer_out_norm="post_self_attn_layernorm", mlp_norm="post_attention_layernorm", mlp_out_norm="post_mlp_layernorm"
)
_HYPERCLOVAX = LLAMA | layer_norms(mixer_out_norm="post_norm1", mlp_out_norm="post_norm2")
_PHI3 = tensors(qkv=("self_attn.qkv_proj",), layout="concatenated", gate_up="mlp.gate_up_proj")
HUNYUAN = tensors(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm")
_BITNET = (
    LLAMA
    | norm_tensors({"layers.{i}.mlp.hidden_norm": f"{LAYER}mlp.ffn_sub_norm"})
    | {
        "layers.{i}.mixer.out_norm.weight": Derived(
            (f"{LAYER}self_attn.attn_sub_norm.weight",),
            lambda target: ((target.shape[0] * target.shape[1],),),
            lambda values, target: values[0],
        )
    }
)
_APERTUS = tensors(mixer_norm="attention_layernorm", mlp_norm="feedforward_layernorm", up=("mlp.up_proj",)) | {
    "layers.{i}.mlp.xielu": Derived(
        tuple(f"{LAYER}mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")),
        lambda target: ((1,), (1,), (), ()),
        lambda values, target: np.stack([value.reshape(()) for value in values]),
    )
}

ARCHITECTURES = tuple(
    Architecture(name=name, model_type=model_type, spec=spec, tensors=table)
    for name, model_type, spec, table in (
        ("LlamaForCausalLM", "llama", _llama, LLAMA),
        ("InternLM3ForCausalLM", "internlm3", _llama, LLAMA),
        ("IQuestCoderForCausalLM", "iquestcoder", _llama, LLAMA),
        ("MistralForCausalLM", "mistral", _mistral, LLAMA),
        ("MinistralForCausalLM", "ministral", _ministral, LLAMA),
        ("Ministral3ForCausalLM", "ministral3", _ministral3, LLAMA),
        ("Qwen2ForCausalLM", "qwen2", _qwen2, LLAMA),
        ("Qwen3ForCausalLM", "qwen3", _qwen3, LLAMA),
        ("ArceeForCausalLM", "arcee", _arcee, tensors(up=("mlp.up_proj",))),
        ("HeliumForCausalLM", "helium", _helium, LLAMA),
        ("SeedOssForCausalLM", "seed_oss", _seed_oss, LLAMA),
        ("GraniteForCausalLM", "granite", _granite, LLAMA),
        ("HyperCLOVAXForCausalLM", "hyperclovax", _hyperclovax, _HYPERCLOVAX),
        ("SmolLM3ForCausalLM", "smollm3", _smollm3, LLAMA),
        ("CwmForCausalLM", "cwm", _cwm, LLAMA),
        ("Ernie4_5ForCausalLM", "ernie4_5", _ernie, LLAMA),
        ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", _hunyuan, HUNYUAN),
        ("NanoChatForCausalLM", "nanochat", _nanochat, tensors(up=("mlp.fc1",), down="mlp.fc2")),
        ("BitNetForCausalLM", "bitnet", _bitnet, _BITNET),
        ("ApertusForCausalLM", "apertus", _apertus, _APERTUS),
        ("GlmForCausalLM", "glm", _glm, _FUSED_UP),
        ("Glm4ForCausalLM", "glm4", _glm4, _GLM4),
        ("Phi3ForCausalLM", "phi3", _phi3, _PHI3),
    )
)
