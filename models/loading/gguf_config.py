"""A GGUF file's metadata as the config.json that the model had. Metadata that is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.layers.rope import inverse_frequencies
from jaxserve.models.loading.gguf_file import GgufFile
from jaxserve.models.loading.hf_config import check_depth
from jaxserve.models.spec import Llama3Scaling, RopeSpec

Config = dict[str, Any]

_IGNORED = {"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout"}
_LLAMA3_CONTEXT = 8192  # that the first Llama 3 was trained on, as every Llama 3.x says
_GEMMA3_PERIOD = 6  # layers from one with full attention to the next
_GEMMA3_27B_LAYERS = 62


class _Fields:
    """The metadata of one architecture, which keeps count of what was read."""

    def __init__(self, file: GgufFile) -> None:
        self.arch = file.metadata["general.architecture"]
        self.values = {n.removeprefix(self.arch + "."): v for n, v in file.metadata.items() if n.startswith(self.arch + ".")}
        self.read: set[str] = set(_IGNORED)

    def __call__(self, name: str, default: Any = ...) -> Any:
        self.read.add(name)
        if name in self.values:
            return self.values[name]
        if default is ...:
            raise ModelLoadError(f"the GGUF file's metadata lacks {self.arch}.{name}; download it again")
        return default

    def count(self, name: str, default: Any = ...) -> int:
        """A field that is a positive number; some architectures have one for each layer instead."""
        value = self(name, default)
        if not isinstance(value, int) or value < 1:
            raise ModelLoadError(f"GGUF metadata {self.arch}.{name} must be a positive number; got {str(value)[:80]}")
        return value

    def refuse_unread(self) -> None:
        unread = {name: value for name, value in self.values.items() if name not in self.read and value}
        if unread:
            text = ", ".join(f"{self.arch}.{name}={value!r}" for name, value in unread.items())
            raise ModelLoadError(f"the GGUF file's metadata has {text[:200]}, which is not supported")


def config_from_gguf(file: GgufFile) -> Config:
    """The fields of config.json.

    Raises:
        ModelLoadError: for an unknown architecture, and for metadata that is missing or not supported.
    """
    arch = str(file.metadata.get("general.architecture"))
    if arch not in _ARCHITECTURES:
        raise ModelLoadError(f"GGUF architecture {arch!r} is not supported. Known ones: {', '.join(_ARCHITECTURES)}.")
    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path} lacks the tensor token_embd.weight. Is it complete, and a language model?")
    name, model_type, own_fields = _ARCHITECTURES[arch]
    fields = _Fields(file)
    heads, width = fields.count("attention.head_count"), fields.count("embedding_length")
    dim = fields.count("attention.key_length", width // heads)
    config: Config = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_hidden_layers": fields.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "head_dim": dim,
        "rms_norm_eps": fields("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.count("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(fields),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields(key, dim) != dim:
            raise ModelLoadError(f"GGUF metadata {arch}.{key}={fields(key)} is not supported; wanted the head's {dim}")
    check_depth(config["num_hidden_layers"])
    try:
        config |= own_fields(fields, file, config)
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ModelLoadError(f"the GGUF file's metadata does not make sense for {arch}: {e}") from e
    fields.refuse_unread()
    return config


def _rope_parameters(fields: _Fields) -> Config:
    kind = fields("rope.scaling.type", "none")
    parameters = {"rope_type": "default", "rope_theta": fields("rope.freq_base", 10000.0)}
    if kind != "none":  # the family refuses kinds that it does not know
        if kind != "linear":
            raise ModelLoadError(f"rope type {kind!r} is not supported in GGUF files; jaxserve can do linear")
        parameters |= {"rope_type": kind, "factor": fields("rope.scaling.factor")}
    return parameters


def _llama(fields: _Fields, file: GgufFile, config: Config) -> Config:
    own: Config = {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    if "rope_freqs.weight" in file.tensors:
        divisors = file.tensors["rope_freqs.weight"].rows(slice(None))[0]
        own["rope_parameters"] = config["rope_parameters"] | _llama3_scaling(divisors, config)
    return own


def _llama3_scaling(divisors: np.ndarray, config: Config) -> Config:
    """Llama 3's scaling, of which llama.cpp keeps only what it divides each frequency by."""
    theta, dim = config["rope_parameters"]["rope_theta"], config["head_dim"]
    scaling = Llama3Scaling(
        factor=float(np.max(divisors)), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=_LLAMA3_CONTEXT
    )
    plain, scaled = (inverse_frequencies(RopeSpec(theta=theta, rotary_dim=dim, scaling=s)) for s in (None, scaling))
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-4):
        raise ModelLoadError("the GGUF file's rope_freqs.weight is not Llama 3's rope scaling, which is the only one supported")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _qwen(fields: _Fields, file: GgufFile, config: Config) -> Config:
    return {"use_sliding_window": False}  # llama.cpp converts none that use it


def _gemma3(fields: _Fields, file: GgufFile, config: Config) -> Config:
    pattern = fields("attention.sliding_window_pattern", _GEMMA3_PERIOD)  # a period, or whether each layer slides
    slides = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(config["num_hidden_layers"])]
    local = {"rope_type": "default", "rope_theta": fields("rope.freq_base_swa", 10000.0)}
    # Gemma's makers scale scores by the width per head in the 27B, else by head_dim.
    is_27b = config["num_hidden_layers"] == _GEMMA3_27B_LAYERS
    per_head = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    scale = fields("attention.scale", None)
    return {
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "sliding_window": fields("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "query_pre_attn_scalar": round(scale**-2) if scale else per_head,
        "final_logit_softcapping": fields("final_logit_softcapping", None),
    }


# general.architecture -> (Hugging Face class, model_type, fields of its own)
_ARCHITECTURES: dict[str, tuple[str, str, Callable[[_Fields, GgufFile, Config], Config]]] = {
    "llama": ("LlamaForCausalLM", "llama", _llama),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", _qwen),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", _qwen),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", _gemma3),
}
