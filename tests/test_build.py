"""What is built, before anything is: of which model steps run several at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve.build import SMALL_STEPS, Build
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.loading import open_source
from jaxserve.sharding import make_mesh
from jaxserve.startup import plan_build
from tests.goldens import cases

MODELS = Path(__file__).parents[1] / "bench" / "models"
H100 = {"platform": "gpu", "attention": "mosaic_gpu"}


def build_of(model: Path, runtime: dict[str, Any], **options: Any) -> Build:
    config = EngineConfig.from_options(model=str(model), load_format="dummy", num_gpu_blocks_override=64, **options)
    build = plan_build(config, open_source(str(model), "dummy"), make_mesh(1))
    return replace(build, runtime=replace(build.runtime, **runtime))


@pytest.mark.parametrize(
    ("model", "runtime", "num_steps"),
    [
        ("qwen3-0.6b", H100, SMALL_STEPS),
        ("qwen3-0.6b", {"platform": "gpu"}, 1),
        ("qwen3-0.6b", {}, 1),
        ("llama-3.1-8b", H100, 1),
        ("llama-3.1-8b", {"platform": "gpu"}, 1),
    ],
)
def test_small_models_run_several_steps_on_an_h100(model: str, runtime: dict[str, Any], num_steps: int) -> None:
    build = build_of(MODELS / model, runtime)
    assert build.num_steps == build.buckets().num_steps == num_steps
    assert bool(build.buckets().repeated_shapes) == (num_steps > 1)


def test_steps_as_asked() -> None:
    assert build_of(MODELS / "llama-3.1-8b", H100, num_scheduler_steps=2).num_steps == 2
    assert build_of(MODELS / "qwen3-0.6b", H100, num_scheduler_steps=1).num_steps == 1
    with pytest.raises(ConfigError, match="one GPU"):
        build_of(MODELS / "qwen3-0.6b", {}, num_scheduler_steps=2).buckets()
    for number in (0, 9):
        with pytest.raises(ConfigError, match=f"1 to 8; got {number}"):
            EngineConfig.from_options(model="any", num_scheduler_steps=number)


def test_recurrent_models_run_one(tmp_path: Path) -> None:
    path = cases.write_checkpoint(tmp_path, "falcon_mamba")
    assert build_of(path, H100).num_steps == 1
