"""Gemma 3, as a text model of its own and as the text part of the one that also takes images."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import gated_mlp, head_dim, refuse, rope, windows
from jaxserve.models.families.llama_tensors import GEMMA_TENSORS
from jaxserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, NormSpec


def _gemma3(config: HfConfig) -> DecoderSpec:
    refuse(config, use_bidirectional_attention=False, attn_logit_softcapping=None)
    dim, bias = head_dim(config), bool(config.attention_bias)
    norm = NormSpec(eps=config.rms_norm_eps, unit_offset=True)
    mlp = gated_mlp(config, config.hidden_activation)

    def layer(kind: str, window: int | None) -> LayerSpec:
        mixer = AttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=dim,
            scale=config.query_pre_attn_scalar**-0.5,
            rope=rope(config.rope_parameters[kind], dim),
            window=window,
            qk_norm=norm,
            qkv_bias=bias,
            out_bias=bias,
        )
        return LayerSpec(mixer=mixer, mlp=mlp)

    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=tuple(layer(kind, window) for kind, window in zip(config.layer_types, windows(config), strict=True)),
        norm=norm,
        norm_placement="sandwich",
        embed_scale=config.hidden_size**0.5,
        tie_embeddings=bool(config.tie_word_embeddings),
        logit_softcap=config.final_logit_softcapping,
        max_position=config.max_position_embeddings,
    )


ARCHITECTURES = (
    Architecture(name="Gemma3ForCausalLM", model_type="gemma3_text", spec=_gemma3, tensors=GEMMA_TENSORS),
    Architecture(
        name="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        spec=lambda config: _gemma3(config.get_text_config()),
        tensors=GEMMA_TENSORS,
        renames={"language_model.": "", "model.language_model.": "model."},  # before and since transformers 4.52
        ignored=("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
    ),
)
