"""Gemma 1 to 4, and 3 and 4 as the text parts of those that also take images."""

from __future__ import annotations

from typing import Any

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same, Stack
from jaxserve.models.families.borrowing import (
    LAYER_INPUTS,
    UNREAD_KV,
    borrowing,
    borrowing_tensors,
    kv_sources,
    layer_inputs,
)
from jaxserve.models.families.from_config import activation, attention, decoder, flags, mlp, refuse, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA
from jaxserve.models.families.moe_assembly import FusedDown, FusedUp
from jaxserve.models.families.qkv_assembly import Qkv
from jaxserve.models.families.rope_config import proportional_rope, rope
from jaxserve.models.families.tensors import LAYER, Table, layer_norms, norm_tensors
from jaxserve.models.spec import (
    AttentionSpec,
    BorrowingAttentionSpec,
    DecoderSpec,
    MlpSpec,
    MoeSpec,
    RopeSpec,
    RouterSpec,
)


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


def _gemma4(config: HfConfig) -> DecoderSpec:
    if config.use_bidirectional_attention == "all":
        refuse(config, use_bidirectional_attention="vision")  # of images; text is causal
    has_inputs = bool(getattr(config, "hidden_size_per_layer_input", 0))
    if has_inputs:
        refuse(config, vocab_size_per_layer_input=config.vocab_size)
    norm, seen, sources = rms(config), windows(config), kv_sources(config)

    def mixer(i: int) -> AttentionSpec:
        own, is_full = config.per_layer_config[i], seen[i] is None
        spec = attention(
            own,
            proportional_rope(config, config.rope_parameters[config.layer_types[i]], own.head_dim),
            window=seen[i],
            **flags(config, BIASES),
            scale=1.0,
            qk_norm=norm,
            v_norm=rms(config, gain=False),
            v_from_k=bool(config.attention_k_eq_v) and is_full,
        )
        return borrowing(spec, sources[i])

    return decoder(
        config,
        norm,
        mixer,
        lambda i: _gemma4_block(config, is_borrowing=sources[i] is not None),
        norm_placement="sandwich",
        embed_scale=config.hidden_size**0.5,
        layer_gain=True,
        layer_inputs=layer_inputs(config) if has_inputs else None,
        logit_softcap=config.final_logit_softcapping,
    )


def _gemma4_block(config: HfConfig, *, is_borrowing: bool) -> MlpSpec | MoeSpec:
    """Experts stand beside the dense block, each of both with norms of its own."""
    act = activation(config.hidden_activation)
    dense = mlp(config, config.intermediate_size * (2 if config.use_double_wide_mlp and is_borrowing else 1), activation=act)
    if not getattr(config, "enable_moe_block", False):
        return dense
    return MoeSpec(
        num_experts=config.num_experts,
        top_k=config.top_k_experts,
        expert=mlp(config, config.moe_intermediate_size, activation=act),
        router=RouterSpec(norm=rms(config), logit_multiplier=config.hidden_size**-0.5, expert_scale=True),
        shared=dense,
        norms=rms(config),
    )


def _gemma4_table(spec: DecoderSpec) -> Table:
    """Where values are made of keys, there is no tensor of their own."""
    table = GEMMA2 | LAYER_INPUTS | _GEMMA4_EXPERTS | {"layers.{i}.gain": Same(f"{LAYER}layer_scalar")}
    for i, layer in enumerate(spec.layers):
        if layer.attention is not None and layer.attention.v_from_k and not isinstance(layer.attention, BorrowingAttentionSpec):
            for ours, kind in (("", "weight"), ("_bias", "bias")):
                names = (f"model.layers.{i}.self_attn.{name}_proj.{kind}" for name in "qkk")
                table[f"layers.{i}.mixer.qkv{ours}"] = Qkv(tuple(names))
    return borrowing_tensors(table, spec)


GEMMA2 = LLAMA | layer_norms(
    mixer_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_GEMMA4_EXPERTS: Table = {
    "layers.{i}.mlp.router": Projection(f"{LAYER}router.proj.weight"),
    "layers.{i}.mlp.router_norm.weight": Same(f"{LAYER}router.scale"),
    "layers.{i}.mlp.expert_scale": Same(f"{LAYER}router.per_expert_scale"),
    "layers.{i}.mlp.experts_up": FusedUp(f"{LAYER}experts.gate_up_proj"),
    "layers.{i}.mlp.experts_down": FusedDown(f"{LAYER}experts.down_proj"),
    "layers.{i}.mlp.shared.up": Stack((f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight")),
    "layers.{i}.mlp.shared.down": Projection(f"{LAYER}mlp.down_proj.weight"),
    **norm_tensors(
        {
            "layers.{i}.mlp.shared_norm": f"{LAYER}pre_feedforward_layernorm",
            "layers.{i}.mlp.shared_out_norm": f"{LAYER}post_feedforward_layernorm_1",
            "layers.{i}.mlp.experts_norm": f"{LAYER}pre_feedforward_layernorm_2",
            "layers.{i}.mlp.experts_out_norm": f"{LAYER}post_feedforward_layernorm_2",
        }
    ),
}
_VAULT = LLAMA | layer_norms(mlp_norm="pre_feedforward_layernorm")

ARCHITECTURES = (
    Architecture(name="GemmaForCausalLM", model_type="gemma", spec=_gemma, tensors=LLAMA),
    Architecture(name="Gemma2ForCausalLM", model_type="gemma2", spec=_gemma2, tensors=GEMMA2),
    Architecture(name="VaultGemmaForCausalLM", model_type="vaultgemma", spec=_gemma2, tensors=_VAULT),
    Architecture(name="Gemma3ForCausalLM", model_type="gemma3_text", spec=_gemma3, tensors=GEMMA2),
    Architecture(name="Gemma4ForCausalLM", model_type="gemma4_text", spec=_gemma4, tensors=_gemma4_table, spare=UNREAD_KV),
    Architecture(
        name="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        spec=lambda config: _gemma3(config.get_text_config()),
        tensors=GEMMA2,
        renames={"language_model.": "", "model.language_model.": "model."},  # before and since transformers 4.52
        ignored=("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
    ),
    Architecture(
        name="Gemma4UnifiedForCausalLM", model_type="gemma4_unified_text", spec=_gemma4, tensors=_gemma4_table, spare=UNREAD_KV
    ),
    *(
        Architecture(
            name=name,
            model_type=model_type,
            spec=lambda config: _gemma4(config.get_text_config()),
            tensors=_gemma4_table,
            renames={"model.language_model.": "model."},
            spare=UNREAD_KV,
            ignored=tuple(
                f"model.{part}." for part in ("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio")
            ),
        )
        for name, model_type in (
            ("Gemma4ForConditionalGeneration", "gemma4"),
            ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified"),
        )
    ),
)
