"""Names of targets, and what is said of those that cannot be had."""

from __future__ import annotations

import importlib.util

import pytest

from jaxserve.errors import ConfigError
from jaxserve.tpu import target
from jaxserve.tpu.target import TPU_MEMORY, open_target

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxserve[tpu]'")


@needs_libtpu
@pytest.mark.parametrize(("name", "count", "kind"), [("tpu:v6e:2x2", 4, "TPU v6 lite"), ("tpu:tpu7x:2x2x1", 8, "TPU7x")])
def test_tpu(name: str, count: int, kind: str) -> None:
    opened = open_target(name)
    assert len(opened.devices) == count and {d.device_kind for d in opened.devices} == {kind}
    assert opened.memory == TPU_MEMORY[name.split(":")[1]]


@needs_libtpu
def test_a_layout_that_no_chip_has() -> None:
    with pytest.raises(ConfigError, match="libtpu knows no such layout, unlike 2x2"):
        open_target("tpu:v6e:3x5")


@pytest.mark.parametrize("name", ["v6e", "tpu:v6e", "tpu:v9:2x2", "gpu:h100", "gpu:h100:0", "gpu:a100:1", "cpu:1", ""])
def test_no_target(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--target must be like tpu:v5e:2x2, .*; got "):
        open_target(name)


@pytest.mark.parametrize(("name", "text"), [("tpu:v6e:2x2", r"jaxserve\[tpu\]"), ("gpu:h100:1", r"jaxserve\[cuda13\]")])
def test_what_compiles_is_not_installed(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=text):
        open_target(name)
