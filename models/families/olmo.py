"""OLMo 1 to 3 and EXAONE 4: from OLMo 2 on norms stand behind mixer and mlp."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import flags, layer_norm, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA, llama_like
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import head_norms, layer_norms
from jaxserve.models.spec import DecoderSpec


def _olmo(config: HfConfig) -> DecoderSpec:
    norm = layer_norm(1e-5, gain=False, bias=False)
    return llama_like(config, norm=norm, **flags(config, BIASES), clip=config.clip_qkv)


def _olmo2(config: HfConfig) -> DecoderSpec:
    placed = {"norm_placement": "post"}
    return llama_like(config, **flags(config, BIASES), qk_norm=rms(config), qk_norm_over="all_heads", decoder_fields=placed)


def _olmo3(config: HfConfig) -> DecoderSpec:
    placed = {"norm_placement": "post", "max_position": config.max_position_embeddings}
    return llama_like(
        config,
        windows=windows(config),
        ropes=[rope(config, config.rope_parameters[kind]) for kind in config.layer_types],
        **flags(config, BIASES),
        qk_norm=rms(config),
        qk_norm_over="all_heads",
        decoder_fields=placed,
    )


def _exaone4(config: HfConfig) -> DecoderSpec:
    window, position = windows(config), rope(config)
    ropes = [position if config.sliding_window is None or seen is not None else None for seen in window]
    return llama_like(config, windows=window, ropes=ropes, qk_norm=rms(config), decoder_fields={"norm_placement": "post"})


POST_NORMS = LLAMA | layer_norms(mixer_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm")
OLMO2 = POST_NORMS | head_norms("self_attn.q_norm.weight", "self_attn.k_norm.weight", "flat")

ARCHITECTURES = (
    Architecture(name="OlmoForCausalLM", model_type="olmo", spec=_olmo, tensors=LLAMA),
    Architecture(name="Olmo2ForCausalLM", model_type="olmo2", spec=_olmo2, tensors=OLMO2),
    Architecture(name="Olmo3ForCausalLM", model_type="olmo3", spec=_olmo3, tensors=OLMO2),
    Architecture(name="Exaone4ForCausalLM", model_type="exaone4", spec=_exaone4, tensors=POST_NORMS),
)
