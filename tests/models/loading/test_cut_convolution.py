"""One convolution that checkpoints hold in three tensors, cut in one of two ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ModelLoadError
from tests.goldens import cases
from tests.models.forward import open_and_load

LINEAR = "model.layers.0.linear_attn."


def test_olmo_hybrid_as_published_and_as_transformers_saves_it(tmp_path: Path) -> None:
    """Two key heads of 24 and four value heads of 10: 48, 48 and 40 channels, or 46, 46 and 44."""
    config = cases.read_config("olmo_hybrid") | {"linear_value_head_dim": 10}
    tensors = cases.read_tensors("olmo_hybrid")
    for name in ("v_proj", "g_proj"):
        tensors[f"{LINEAR}{name}.weight"] = tensors[f"{LINEAR}{name}.weight"][:40]
    tensors[f"{LINEAR}o_norm.weight"] = tensors[f"{LINEAR}o_norm.weight"][:10]
    tensors[f"{LINEAR}o_proj.weight"] = np.ascontiguousarray(tensors[f"{LINEAR}o_proj.weight"][:, :40])
    whole = cases.draw("convolution", (136, 1, 4))

    def load(name: str, cuts: list[int]) -> tuple[np.ndarray, ...]:
        parts = dict(zip((f"{LINEAR}{part}_conv1d.weight" for part in "qkv"), np.split(whole, cuts), strict=True))
        folder = cases.write_checkpoint(tmp_path / name, "olmo_hybrid", config=config, tensors=tensors | parts)
        model, weights = open_and_load(folder)
        paths = [p.path for p in model.parameters]
        return tuple(np.asarray(weights[paths.index(f"layers.0.mixer.{conv}")]) for conv in ("conv_qk", "conv_v"))

    published, saved = load("published", [48, 96]), load("saved", [46, 92])
    np.testing.assert_array_equal(published[0], whole[:96, 0].T.reshape(4, 2, 2, 24))
    np.testing.assert_array_equal(published[1], whole[96:, 0].T.reshape(4, 2, 2, 10))
    for one, other in zip(published, saved, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ModelLoadError, match="q_conv1d.weight has shape"):
        load("other", [40, 88])
