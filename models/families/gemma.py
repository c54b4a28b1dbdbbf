"""Gemma 1 to 3, and Gemma 3 as the text part of the one that also takes images."""

from __future__ import annotations

from typing import Any

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import activation, attention, decoder, flags, mlp, refuse, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import layer_norms
from jaxserve.models.spec import DecoderSpec, RopeSpec


def _gemma_like(config: HfConfig, act: str, ropes: list[RopeSpec], **fields: Any) -> DecoderSpec:
    placement, changes = fields.pop("norm_placement", "pre"), {"logit_softcap": getattr(config, "final_logit_softcapping", None)}
    window = windows(config) if getattr(config, "layer_types", None) else [None] * config.num_hidden_layers
    return decoder(
        config,
        rms(config, unit_offset=True),
        lambda i: attention(config, ropes[i], window=window[i], **flags(config, BIASES), **fields),
        mlp(config, activation=activation(act)),
        norm_placement=placement,
        embed_scale=config.hidden_size**0.5,
        **changes,
    )


def _gemma(config: HfConfig) -> DecoderSpec:
    refuse(config, use_bidirectional_attention=False)
    return _gemma_like(config, config.hidden_act, [rope(config)] * config.num_hidden_layers)


def _gemma2(config: HfConfig) -> DecoderSpec:
    refuse(config, use_bidirectional_attention=False)
    scale, cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
    ropes = [rope(config)] * config.num_hidden_layers
    placement = "pre" if config.model_type == "vaultgemma" else "sandwich"
    return _gemma_like(config, config.hidden_activation, ropes, scale=scale, softcap=cap, norm_placement=placement)


def _gemma3(config: HfConfig) -> DecoderSpec:
    refuse(config, use_bidirectional_attention=False, attn_logit_softcapping=None)
    ropes = [rope(config, config.rope_parameters[kind]) for kind in config.layer_types]
    norm = rms(config, unit_offset=True)
    scale = config.query_pre_attn_scalar**-0.5
    return _gemma_like(config, config.hidden_activation, ropes, scale=scale, qk_norm=norm, norm_placement="sandwich")


GEMMA2 = LLAMA | layer_norms(
    mixer_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_VAULT = LLAMA | layer_norms(mlp_norm="pre_feedforward_layernorm")

ARCHITECTURES = (
    Architecture(name="GemmaForCausalLM", model_type="gemma", spec=_gemma, tensors=LLAMA),
    Architecture(name="Gemma2ForCausalLM", model_type="gemma2", spec=_gemma2, tensors=GEMMA2),
    Architecture(name="VaultGemmaForCausalLM", model_type="vaultgemma", spec=_gemma2, tensors=_VAULT),
    Architecture(name="Gemma3ForCausalLM", model_type="gemma3_text", spec=_gemma3, tensors=GEMMA2),
    Architecture(
        name="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        spec=lambda config: _gemma3(config.get_text_config()),
        tensors=GEMMA2,
        renames={"language_model.": "", "model.language_model.": "model."},  # before and since transformers 4.52
        ignored=("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
    ),
)
