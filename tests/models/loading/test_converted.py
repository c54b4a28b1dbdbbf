"""A converted model gives the very arrays that its checkpoint gives, on any mesh."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import cli
from jaxserve.errors import ModelLoadError
from jaxserve.models.loading import describe_model, load_weights, open_source
from jaxserve.sharding import Shardings, kv_repeat, make_mesh
from tests.goldens import cases


def convert(tmp_path: Path, case: str, *options: str) -> tuple[Path, Path]:
    folder, out = cases.write_checkpoint(tmp_path / "hf", case), tmp_path / "converted"
    (folder / "tokenizer.json").write_text("{}")
    assert cli.main(["convert", str(folder), "--output", str(out), "--dtype", "float32", *options]) == 0
    return folder, out


def load(folder: Path, devices: int) -> dict[str, np.ndarray]:
    source = open_source(str(folder))
    repeat = partial(kv_repeat, tensor_parallel_size=devices)
    model = describe_model(source, dtype=jnp.float32, kv_repeat=repeat, outputs_first=devices > 1)
    shardings = Shardings(make_mesh(devices))
    weights = load_weights(source, model, sharding_for=shardings.of)
    for parameter, weight in zip(model.parameters, weights, strict=True):
        ((abstract, axes),) = parameter.arrays
        assert weight.shape == abstract.shape and weight.sharding == shardings.of(axes, weight.shape), parameter.path
    return {p.path: np.asarray(w) for p, w in zip(model.parameters, weights, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case, written_on, read_on", [("olmo2", 1, 4), ("deepseek_v3", 2, 1), ("llama_bias", 1, 2)])
def test_same_arrays(case: str, written_on: int, read_on: int, tmp_path: Path) -> None:
    folder, out = convert(tmp_path, case, "--tensor-parallel-size", str(written_on))
    assert {f.name for f in out.iterdir()} == {"config.json", "tokenizer.json", "jaxserve_weights"}
    want, got = load(folder, read_on), load(out, read_on)
    assert want.keys() == got.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path)


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = convert(tmp_path, "qwen2")
    assert cli.main(["convert", str(folder), "--output", str(out)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    (out / "config.json").write_text(json.dumps(cases.read_config("qwen2") | {"intermediate_size": 112}))
    with pytest.raises(ModelLoadError, match=r"parameter layers.\d.mlp.\w+ of .* has shape .*; the config wants"):
        load(out, 1)
