"""Bloom, Falcon and MPT, which came with ALiBi (https://arxiv.org/abs/2108.12409)."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import layer_norm, refuse
from jaxserve.models.families.gpt import gpt_like, head_dim_of
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import norm_tensors, tensors
from jaxserve.models.spec import DecoderSpec


def _slopes(num_heads: int) -> tuple[float, ...]:
    """A geometric series; heads past a power of two take every other one of the next finer series."""
    whole = 2 ** math.floor(math.log2(num_heads))

    def series(heads: int) -> list[float]:
        return [float(2 ** (-8 / heads * (i + 1))) for i in range(heads)]

    return tuple(series(whole) + series(2 * whole)[::2][: num_heads - whole])


def _mpt_slopes(num_heads: int) -> tuple[float, ...]:
    """MPT's order: where heads are no power of two, every other one of the next finer series first."""
    whole = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-8 / whole * (i + 1)) for i in range(whole)]
    return tuple((slopes if whole == num_heads else slopes[1::2] + slopes[::2])[:num_heads])


def _bloom(config: HfConfig) -> DecoderSpec:
    eps, width = config.layer_norm_epsilon, config.hidden_size
    return gpt_like(
        config,
        act="gelu_new",
        dim=4 * width,
        eps=eps,
        attention=lambda i: {"alibi": _slopes(config.num_attention_heads)},
        embed_norm=layer_norm(eps),
        residual_from_norm=bool(config.apply_residual_connection_post_layernorm),
        max_position=getattr(config, "seq_length", None) or 2048,
    )


def _falcon(config: HfConfig) -> DecoderSpec:
    heads, bias, new = config.num_attention_heads, bool(config.bias), bool(config.new_decoder_architecture)
    kv_heads = config.num_kv_heads if new else 1 if config.multi_query else heads
    fields: dict[str, Any] = {"num_kv_heads": kv_heads, "qkv_bias": bias, "out_bias": bias}
    if config.alibi:
        rounded = np.asarray(_slopes(heads), ml_dtypes.bfloat16).astype(float)
        fields |= {"alibi": tuple(rounded.tolist()), "alibi_rounded": True}
    else:
        fields["rope"] = rope(config, dim=head_dim_of(config))
    if new and not config.parallel_attn:
        raise ModelLoadError("falcon with new_decoder_architecture and parallel_attn=False is not supported")
    two = new and config.num_ln_in_parallel_attn in (None, 2)
    if config.num_ln_in_parallel_attn == 2 and not new:
        raise ModelLoadError("falcon with num_ln_in_parallel_attn=2 needs new_decoder_architecture=True")
    return gpt_like(
        config,
        act=config.activation,
        dim=config.ffn_hidden_size,
        eps=config.layer_norm_epsilon,
        attention=lambda i: fields,
        mlp_bias=bias,
        norm_placement="parallel" if two else "parallel_shared" if config.parallel_attn else "pre",
    )


def _mpt(config: HfConfig) -> DecoderSpec:
    own = config.attn_config
    refuse(own, alibi=True, alibi_bias_max=8, prefix_lm=False, qk_ln=False, attn_type="multihead_attention")
    refuse(config, no_bias=True, logit_scale=None, expansion_ratio=4)
    fields = {
        "alibi": _mpt_slopes(config.num_attention_heads),
        "scale": own.softmax_scale or head_dim_of(config) ** -0.5,
        "clip": own.clip_qkv or None,
        "qkv_bias": False,
        "out_bias": False,
    }
    eps = config.layer_norm_epsilon
    return gpt_like(
        config,
        act="gelu",
        dim=4 * config.hidden_size,
        eps=eps,
        norm=layer_norm(eps, bias=False),
        attention=lambda i: fields,
        mlp_bias=False,
        max_position=config.max_seq_len,
    )


_H = "transformer.h.{i}."
_FUSED: dict[str, Any] = {"qkv": ("self_attention.query_key_value",), "layout": "grouped", "out": "self_attention.dense"}
_MLP: dict[str, Any] = {"up": ("mlp.dense_h_to_4h",), "down": "mlp.dense_4h_to_h"}
_WORDS: dict[str, Any] = {"layer": _H, "embed": "transformer.word_embeddings", "final_norm": "transformer.ln_f"}
_BLOOM = tensors(**_WORDS, **_FUSED, **_MLP) | norm_tensors({"embed_norm": "transformer.word_embeddings_layernorm"})
_FALCON = tensors(**_WORDS, **_FUSED, **_MLP)
_FALCON_TWO_NORMS = _FALCON | norm_tensors({"layers.{i}.mixer_norm": f"{_H}ln_attn", "layers.{i}.mlp_norm": f"{_H}ln_mlp"})
_MPT = tensors(
    layer="transformer.blocks.{i}.",
    embed="transformer.wte",
    final_norm="transformer.norm_f",
    mixer_norm="norm_1",
    mlp_norm="norm_2",
    qkv=("attn.Wqkv",),
    layout="concatenated",
    out="attn.out_proj",
    up=("ffn.up_proj",),
    down="ffn.down_proj",
)

ARCHITECTURES = (
    Architecture(name="BloomForCausalLM", model_type="bloom", spec=_bloom, tensors=_BLOOM),
    Architecture(
        name="FalconForCausalLM",
        model_type="falcon",
        spec=_falcon,
        tensors=lambda spec: _FALCON_TWO_NORMS if spec.norm_placement == "parallel" else _FALCON,
    ),
    Architecture(name="MptForCausalLM", model_type="mpt", spec=_mpt, tensors=_MPT),
)
