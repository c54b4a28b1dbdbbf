"""Writes a reference case as the GGUF file that llama.cpp's converter would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.goldens import cases

ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def write_gguf(
    path: Path, case: str, *, fields: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """Writes `case`.

    Args:
        fields: metadata to add or replace, "{arch}." filled in; None drops one.
        tensors: GGUF tensors to add or replace.
    """
    config = cases.read_config(case)
    arch = ARCH[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (_fields(config) | (fields or {})).items():
        if value is not None:
            _add(writer, name.replace("{arch}", arch), value)
    for name, tensor in (_tensors(case, config, arch) | (tensors or {})).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, list):
        writer.add_array(name, value)
    else:
        writer.add_uint32(name, value)


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    fields = {
        "{arch}.block_count": config["num_hidden_layers"],
        "{arch}.context_length": config["max_position_embeddings"],
        "{arch}.embedding_length": config["hidden_size"],
        "{arch}.feed_forward_length": config["intermediate_size"],
        "{arch}.attention.head_count": config["num_attention_heads"],
        "{arch}.attention.head_count_kv": config["num_key_value_heads"],
        "{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "{arch}.rope.freq_base": rope["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(config["vocab_size"])],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.eot_token_id": 7,
    }
    if rope["rope_type"] == "linear":
        fields |= {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": rope["factor"]}
    if "head_dim" in config:
        fields |= {"{arch}.attention.key_length": config["head_dim"], "{arch}.attention.value_length": config["head_dim"]}
    if config["model_type"] == "gemma3_text":
        fields["{arch}.attention.sliding_window"] = config["sliding_window"]
        fields["{arch}.attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
        fields["{arch}.rope.freq_base_swa"] = config["rope_parameters"]["sliding_attention"]["rope_theta"]
        fields["{arch}.final_logit_softcapping"] = config["final_logit_softcapping"]
    return fields


def _tensors(case: str, config: dict[str, Any], arch: str) -> dict[str, np.ndarray]:
    arch_id = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(arch_id, config["num_hidden_layers"])
    tensors = {}
    for name, tensor in cases.read_tensors(case).items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if not (config["tie_word_embeddings"] and name == "lm_head.weight"):
            tensors[gguf_name] = tensor
    return tensors
