"""A device without memory is an error of the options, not a traceback."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from jaxserve import startup
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError


@pytest.mark.parametrize("build", [startup.build_engine, startup.compile_model])
def test_it_says_what_to_do(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1234 bytes.\nmore")

    monkeypatch.setattr(startup, "open_source", fail)
    with pytest.raises(ConfigError, match=r"allocating 1234 bytes\..*--gpu-memory-utilization") as caught:
        build(EngineConfig.from_options(model="m", compilation_cache_dir=""))
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(startup, "open_source", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        startup.build_engine(EngineConfig.from_options(model="m", compilation_cache_dir=""))
