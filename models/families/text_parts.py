"""Text parts of models that also take images: Mistral 3, Llama 4, Qwen-VL, LLaVA, InternVL, SmolVLM. Knows nothing of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families import gpt_oss, llama
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.from_config import flags, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA, llama_like
from jaxserve.models.families.moe import experts, sparse_layers
from jaxserve.models.families.moe_assembly import FusedDown, FusedUp
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors
from jaxserve.models.spec import DecoderSpec, RouterSpec

_TEXT = {a.model_type: a for a in (*llama.ARCHITECTURES, *gpt_oss.ARCHITECTURES)}
_NAMES = {"language_model.": "", "model.language_model.": "model."}  # before and since transformers 4.52
_VISION = ("vision_tower.", "vision_model.", "multi_modal_projector.", "connector.", "visual.", "image_newline")
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


def _whole(name: str, model_type: str, *text_types: str, renames: Mapping[str, str] = _NAMES) -> Architecture:
    """A model around one of these text models, whose tables are the same."""

    def spec(config: HfConfig) -> DecoderSpec:
        text = config.get_text_config()
        if text.model_type not in text_types:
            raise ModelLoadError(
                f"{model_type} around {text.model_type!r} is not supported; jaxserve can do {', '.join(text_types)}"
            )
        return _TEXT[text.model_type].spec(text)

    return _architecture(name, model_type, spec, _TEXT[text_types[0]].tensors, renames)


def _architecture(name: str, model_type: str, spec: Any, tensors: Any, renames: Mapping[str, str] = _NAMES) -> Architecture:
    ignored = (*_VISION, *(f"model.{prefix}" for prefix in _VISION))
    return Architecture(name=name, model_type=model_type, spec=spec, tensors=tensors, renames=renames, ignored=ignored)


def _qwen_vl(config: HfConfig, **fields: Any) -> DecoderSpec:
    """Text alone has the same position on all of mrope's axes, so that it is plain rope."""
    text = config.get_text_config()
    position = rope(text, read_elsewhere=("mrope_section", "mrope_interleaved", "type"))
    tied = {"tie_embeddings": bool(config.tie_word_embeddings)}
    return llama_like(text, ropes=[position] * text.num_hidden_layers, decoder_fields=tied, **fields)


def _qwen2_vl(config: HfConfig) -> DecoderSpec:
    return _qwen_vl(config, windows=windows(config.get_text_config()), qkv_bias=True)


def _qwen3_vl(config: HfConfig) -> DecoderSpec:
    text = config.get_text_config()
    return _qwen_vl(config, **flags(text, BIASES), qk_norm=rms(text))


def _qwen3_vl_moe(config: HfConfig) -> DecoderSpec:
    text = config.get_text_config()
    block = experts(text, text.num_experts, text.num_experts_per_tok, RouterSpec(), dim=text.moe_intermediate_size)
    return _qwen_vl(config, **flags(text, BIASES), qk_norm=rms(text), mlp_spec=sparse_layers(text, block))


_QWEN3_MOE: Table = LLAMA | {
    **moe_tensors(),
    "layers.{i}.mlp.experts_up": FusedUp(f"{LAYER}mlp.experts.gate_up_proj", "halves"),
    "layers.{i}.mlp.experts_down": FusedDown(f"{LAYER}mlp.experts.down_proj", is_linear=False),
}

ARCHITECTURES = (
    _whole("Mistral3ForConditionalGeneration", "mistral3", "mistral", "ministral3"),
    _whole("LlavaForConditionalGeneration", "llava", *_LLAMAS),
    _whole("LlavaNextForConditionalGeneration", "llava_next", *_LLAMAS),
    _whole("LlavaOnevisionForConditionalGeneration", "llava_onevision", *_LLAMAS),
    _whole("InternVLForConditionalGeneration", "internvl", *_LLAMAS),
    _whole("Idefics3ForConditionalGeneration", "idefics3", "llama", renames={"model.text_model.": "model."}),
    _whole("SmolVLMForConditionalGeneration", "smolvlm", "llama", renames={"model.text_model.": "model."}),
    _whole("Llama4ForConditionalGeneration", "llama4", "llama4_text"),
    _architecture("Qwen2VLForConditionalGeneration", "qwen2_vl", _qwen2_vl, LLAMA),
    _architecture("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", _qwen2_vl, LLAMA),
    _architecture("Qwen3VLForConditionalGeneration", "qwen3_vl", _qwen3_vl, LLAMA),
    _architecture("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", _qwen3_vl_moe, _QWEN3_MOE),
)
