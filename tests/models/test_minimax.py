"""What MiniMax's checkpoints hold although it follows from the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.errors import ModelLoadError
from tests.goldens.cases import read_tensors, write_checkpoint
from tests.models.forward import open_and_load


def test_other_decays_are_refused(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.slope_rate"
    tensors = read_tensors("minimax")
    open_and_load(write_checkpoint(tmp_path / "same", "minimax", tensors=tensors))
    with pytest.raises(ModelLoadError, match=name):
        open_and_load(write_checkpoint(tmp_path / "other", "minimax", tensors=tensors | {name: tensors[name] * 1.5}))


def test_a_layer_without_its_tensors_is_refused(tmp_path: Path) -> None:
    """One path has two forms, and neither is there."""
    tensors = {name: tensor for name, tensor in read_tensors("minimax").items() if "layers.0.self_attn." not in name}
    with pytest.raises(ModelLoadError, match="layers.0.mixer.qkv are missing, or are those of attention"):
        open_and_load(write_checkpoint(tmp_path, "minimax", tensors=tensors))
