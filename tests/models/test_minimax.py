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
