"""What start-up says of how attention is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.build import Build
from jaxserve.config import EngineConfig
from jaxserve.models.loading import open_source
from jaxserve.sharding import make_mesh
from jaxserve.startup import plan_build
from jaxserve.summary import summary_of
from tests.goldens import cases


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    path = cases.write_checkpoint(tmp_path_factory.mktemp("model"), "llama")
    return plan_build(EngineConfig.from_options(model=str(path)), open_source(str(path)), make_mesh(1))


@pytest.mark.parametrize(
    ("runtime", "text"),
    [
        ({}, "by XLA loops"),
        ({"platform": "gpu", "attention": "mosaic_gpu"}, "by kernels"),
        ({"platform": "gpu"}, "by XLA loops: jaxserve has kernels for H100 and H200, not for this GPU"),
    ],
)
def test_attention(build: Build, runtime: dict[str, Any], text: str) -> None:
    assert summary_of(replace(build, runtime=replace(build.runtime, **runtime)), 1)["attention"] == text
