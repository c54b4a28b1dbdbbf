"""Hugging Face folders: what is read, and what is refused before anything is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import ModelLoadError
from jaxserve.models.loading import open_source, resolve_dtype
from jaxserve.models.registry import find_architecture
from tests.goldens import cases
from tests.models.forward import open_and_load

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def changed(**tensors: np.ndarray | None) -> cases.Tensors:
    """The qwen2 case's tensors with some replaced, added, or (None) dropped; "__" in a name stands for "."."""
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: t for name, t in (cases.read_tensors("qwen2") | new).items() if t is not None}


def test_shards_and_harmless_extras(tmp_path: Path) -> None:
    head = cases.read_tensors("qwen2")[EMBED]
    tensors = changed(model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(8, np.float32), lm_head__weight=head)
    _, weights = open_and_load(cases.write_checkpoint(tmp_path / "shards", "qwen2", tensors=tensors, num_files=3))
    _, wanted = open_and_load(cases.write_checkpoint(tmp_path / "one", "qwen2"))
    for got, want in zip(weights, wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_head_that_is_not_the_embeddings_is_not_tied(tmp_path: Path) -> None:
    """Whatever the config says: transformers does the same."""
    tensors = changed(lm_head__weight=np.ones((160, 64), np.float32))
    source = open_source(str(cases.write_checkpoint(tmp_path, "qwen2", tensors=tensors)))
    assert source.config.tie_word_embeddings and not source.spec.tie_embeddings
    assert {EMBED, "lm_head.weight"} <= source.tensors.keys()


def test_a_tied_head_alone_is_the_embeddings_too(tmp_path: Path) -> None:
    head = cases.read_tensors("qwen2")[EMBED]
    tensors = changed(lm_head__weight=head, **{EMBED: None})
    model, weights = open_and_load(cases.write_checkpoint(tmp_path, "qwen2", tensors=tensors))
    np.testing.assert_array_equal(weights[[p.path for p in model.parameters].index("embed")], head)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bloom", "opt", "gpt_neox", "mamba"])
def test_names_of_a_model_saved_without_its_head(case: str, tmp_path: Path) -> None:
    """They lack their first part; a head that is there all the same has none anyway."""
    first = next(name for name in cases.read_tensors(case) if "layers.0." in name or "h.0." in name).partition(".")[0] + "."
    tensors = {name.removeprefix(first): tensor for name, tensor in cases.read_tensors(case).items()}
    bare = open_source(str(cases.write_checkpoint(tmp_path / "bare", case, tensors=tensors)))
    assert bare.tensors.keys() == open_source(str(cases.write_checkpoint(tmp_path / "whole", case))).tensors.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints(dtype: str, tmp_path: Path) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in cases.read_tensors("qwen3").items()}
    folder = cases.write_checkpoint(tmp_path, "qwen3", tensors=tensors)
    source = open_source(str(folder))
    assert source.checkpoint_dtype == dtype
    assert resolve_dtype("auto", "gpu", source) == ml_dtypes.bfloat16
    assert resolve_dtype("auto", "cpu", source) == np.float32
    assert resolve_dtype("float32", "gpu", source) == np.float32
    model, weights = open_and_load(folder)
    embed = weights[[p.path for p in model.parameters].index("embed")]
    np.testing.assert_array_equal(embed, tensors["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({Q_PROJ: None}, f"lacks the tensor {Q_PROJ}, which Qwen2ForCausalLM needs"),
        ({Q_PROJ: np.ones((64, 32), np.float32)}, rf"{Q_PROJ} has shape \[64, 32\]; the config wants \[64, 64\]"),
        ({"model.layers.3.mlp.up_proj.weight": np.ones((96, 64), np.float32)}, "holds the tensor model.layers.3.mlp.up_proj"),
        ({Q_PROJ: np.ones((64, 64), np.int8)}, f"{Q_PROJ} has dtype I8"),
    ],
)
def test_refuses_tensors(tensors: dict[str, np.ndarray | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        open_and_load(cases.write_checkpoint(tmp_path, "qwen2", tensors=changed(**tensors)))


@pytest.mark.parametrize("keep", [0, 6, 100, 10_000])
def test_refuses_a_truncated_file(keep: int, tmp_path: Path) -> None:
    file = cases.write_checkpoint(tmp_path, "qwen2") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="model.safetensors is not a whole safetensors file"):
        open_source(str(tmp_path))


def test_refuses_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="config.json is missing"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read as JSON"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("qwen2")))
    with pytest.raises(ModelLoadError, match="neither model.safetensors nor"):
        open_source(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelLoadError, match="pickle files only.*safetensors"):
        open_source(str(tmp_path))


def test_refuses_a_missing_shard(tmp_path: Path) -> None:
    cases.write_checkpoint(tmp_path, "qwen2", num_files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="model-00002-of-00002.safetensors is missing"):
        open_source(str(tmp_path))


def test_refuses_an_index_that_does_not_hold(tmp_path: Path) -> None:
    index = cases.write_checkpoint(tmp_path, "qwen2", num_files=2) / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["nowhere"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(ModelLoadError, match="says that tensor nowhere is in model-00001"):
        open_source(str(tmp_path))
    index.write_text('{"weight_map": ["x"]}')
    with pytest.raises(ModelLoadError, match="no weight_map"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("entry", ["../outside.safetensors", "{outside}", "sub/../../outside.safetensors", "link.safetensors"])
def test_refuses_an_index_that_leaves_the_folder(entry: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"a": np.ones(2, np.float32)}, outside)
    folder = cases.write_checkpoint(tmp_path / "model", "qwen2", num_files=2)
    (folder / "link.safetensors").symlink_to(outside)
    weight_map = {"a": entry.format(outside=outside)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match="leaves the model's folder"):
        open_source(str(folder))


def test_refuses_a_single_file_that_links_outside(tmp_path: Path) -> None:
    folder = cases.write_checkpoint(tmp_path / "model", "qwen2")
    os.rename(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelLoadError, match="leaves the model's folder"):
        open_source(str(folder))


@pytest.mark.parametrize(
    "files, wanted",
    [
        ({}, {"eos_token_id": 2}),
        ({"generation_config.json": {"eos_token_id": [2, 9], "temperature": 0.7, "top_k": None}}, {"eos_token_id": [2, 9], "temperature": 0.7}),
        ({"generation_config.json": {"top_p": 0.9}}, {"eos_token_id": 2, "top_p": 0.9}),
    ],
)  # fmt: skip
def test_generation_config(files: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    cases.write_checkpoint(tmp_path, "qwen2")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert open_source(str(tmp_path)).generation_config == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, model_type, case",
    [
        ("Gemma3ForConditionalGeneration", "gemma3", "gemma3_linear"),
        ("Gemma3nForConditionalGeneration", "gemma3n", "gemma3n_text"),
        ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified", "gemma4_unified_text"),
        ("Mistral3ForConditionalGeneration", "mistral3", "mistral"),
        ("Mistral3ForConditionalGeneration", "mistral3", "ministral3"),
        ("LlavaForConditionalGeneration", "llava", "llama2"),
        ("InternVLForConditionalGeneration", "internvl", "qwen3"),
        ("SmolVLMForConditionalGeneration", "smolvlm", "llama"),
        ("Llama4ForConditionalGeneration", "llama4", "llama4_text"),
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", "qwen2"),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "qwen2_window"),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl", "qwen3"),
        ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", "qwen3_moe"),
    ],
)
def test_models_with_images_as_text_models(name: str, model_type: str, case: str, tmp_path: Path) -> None:
    """Every spelling of the text part's tensor names; the vision part is left out."""
    text = cases.read_config(case)
    if model_type.startswith("qwen"):
        text["model_type"] = f"{model_type}_text"
    config = {"architectures": [name], "model_type": model_type, "text_config": text}
    config["tie_word_embeddings"] = text["tie_word_embeddings"]
    plain, wanted = open_and_load(cases.write_checkpoint(tmp_path / "plain", case))
    tensors = cases.read_tensors(case)
    for i, (prefix, ours) in enumerate(find_architecture(config).renames.items()):
        spelled = {prefix + n.removeprefix(ours) if n.startswith(ours) else n: t for n, t in fused(tensors, model_type).items()}
        spelled[prefix.replace("language_model", "vision_tower").replace("text_model", "vision_model") + "weight"] = np.ones(
            4, np.float32
        )
        folder = cases.write_checkpoint(tmp_path / str(i), case, config=config, tensors=spelled)
        model, weights = open_and_load(folder)
        assert model.spec == plain.spec
        for got, want in zip(weights, wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def fused(tensors: cases.Tensors, model_type: str) -> cases.Tensors:
    """The tensors with experts as Qwen3-VL's checkpoints have them: all in one, inputs before outputs."""
    if model_type != "qwen3_vl_moe":
        return tensors
    left = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in tensors.keys() - left.keys()}:
        gate, up, down = (
            np.stack([tensors[f"{layer}.experts.{e}.{kind}_proj.weight"].T for e in range(6)]) for kind in ("gate", "up", "down")
        )
        left |= {f"{layer}.experts.gate_up_proj": np.concatenate((gate, up), axis=-1), f"{layer}.experts.down_proj": down}
    return {name: np.ascontiguousarray(tensor) for name, tensor in left.items()}
