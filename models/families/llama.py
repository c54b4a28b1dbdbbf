"""Llama 2 and 3, and those that differ from them by a field or two: Mistral, Qwen 2 and 3."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import gated_mlp, head_dim, refuse, rope, windows
from jaxserve.models.families.llama_tensors import LLAMA_TENSORS
from jaxserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, NormSpec


def _spec(
    config: HfConfig,
    *,
    windows: Sequence[int | None] | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderSpec:
    dim = head_dim(config)
    norm = NormSpec(eps=config.rms_norm_eps)
    position = rope(config.rope_parameters, dim)
    mlp = gated_mlp(config, config.hidden_act, bias=mlp_bias)

    def layer(window: int | None) -> LayerSpec:
        mixer = AttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=dim,
            scale=dim**-0.5,
            rope=position,
            window=window,
            qk_norm=norm if qk_norm else None,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
        )
        return LayerSpec(mixer=mixer, mlp=mlp)

    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=tuple(layer(window) for window in windows or [None] * config.num_hidden_layers),
        norm=norm,
        tie_embeddings=bool(config.tie_word_embeddings),
        max_position=config.max_position_embeddings,
    )


def _llama(config: HfConfig) -> DecoderSpec:
    bias = bool(config.attention_bias)
    return _spec(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.mlp_bias))


def _mistral(config: HfConfig) -> DecoderSpec:
    refuse(config, layer_types=None)  # some are Ministral under Mistral's name: other windows in other layers
    return _spec(config, windows=[config.sliding_window] * config.num_hidden_layers)


def _qwen2(config: HfConfig) -> DecoderSpec:
    return _spec(config, windows=windows(config), qkv_bias=True)


def _qwen3(config: HfConfig) -> DecoderSpec:
    bias = bool(config.attention_bias)
    return _spec(config, windows=windows(config), qkv_bias=bias, out_bias=bias, qk_norm=True)


ARCHITECTURES = tuple(
    Architecture(name=name, model_type=model_type, spec=spec, tensors=LLAMA_TENSORS)
    for name, model_type, spec in (
        ("LlamaForCausalLM", "llama", _llama),
        ("MistralForCausalLM", "mistral", _mistral),
        ("Qwen2ForCausalLM", "qwen2", _qwen2),
        ("Qwen3ForCausalLM", "qwen3", _qwen3),
    )
)
