"""What tells two processes' models, options and versions apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.multihost.identity import difference, fingerprint, identity_of
from tests.goldens import cases


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_checkpoint(tmp_path_factory.mktemp("model") / "one", "llama", num_files=2)


def of(model: Path, num_processes: int = 2, **options: Any) -> dict[str, Any]:
    identity = identity_of(EngineConfig.from_options(model=str(model), **options), num_processes)
    return dict(json.loads(json.dumps(identity)))  # as it travels


def test_a_copy_elsewhere_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "two"))
    (copy / "notes.txt").write_text("mine")
    own = {"served_model_name": "m", "compilation_cache_dir": "x", "max_num_queued_reqs": 3, "skip_tokenizer_init": True}
    assert difference(of(model), of(copy, **own)) is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_num_seqs": 8}, "another config: max_num_seqs 8 where process 0 has None"),
        ({"tensor_parallel_size": 4}, "another config: tensor_parallel_size 4 where process 0 has 1"),
        ({"dtype": "bfloat16"}, "another config: dtype 'bfloat16' where process 0 has 'auto'"),
        ({"num_processes": 3}, "another config: num_processes 3 where process 0 has 2"),
    ],
)
def test_other_options(model: Path, options: dict[str, Any], text: str) -> None:
    assert text in str(difference(of(model), of(model, **options)))


def test_other_versions(model: Path) -> None:
    other = of(model)
    other["versions"]["jax"] = "0.1"
    assert "another version: jax '0.1' where process 0 has" in str(difference(of(model), other))
    assert "the same commit" in str(difference(of(model), of(model) | {"source": "other"}))
    assert "another version" in str(difference(of(model), {}))


def test_other_weights(model: Path, tmp_path: Path) -> None:
    tensors = {name: np.asarray(tensor) for name, tensor in cases.read_tensors("llama").items()}
    name = next(iter(tensors))
    changed = cases.write_checkpoint(tmp_path / "two", "llama", tensors=tensors | {name: tensors[name] + 1}, num_files=2)
    assert "another model" in str(difference(of(model), of(changed)))
    assert fingerprint(model, with_weights=False) == fingerprint(changed, with_weights=False)
    (changed / "config.json").write_text(json.dumps(cases.read_config("llama") | {"rms_norm_eps": 1e-3}))
    assert fingerprint(model, with_weights=False) != fingerprint(changed, with_weights=False)


def test_a_gguf_file(smollm2_path: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "copy.gguf"
    renamed.symlink_to(smollm2_path)
    assert fingerprint(smollm2_path, with_weights=True) == fingerprint(renamed, with_weights=False)
