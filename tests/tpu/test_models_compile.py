"""Real models, whole, on topologies where they fit; and what is said where they do not. `make test-tpu`: takes long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxserve.errors import DoesNotFitError
from tests.tpu.steps import CHIPS, MODELS, check_step, compile_step, count_collectives, plan, write_config
from tests.tpu.test_target import needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.usefixtures("no_compile_cache")]

SIZES = {"max_model_len": 8192, "max_num_batched_tokens": 512, "max_num_seqs": 64}


class Case(NamedTuple):
    model: str
    target: str
    devices: int

    def __str__(self) -> str:
        return f"{self.model} on {self.devices} of {self.target}"


CASES = [
    Case("llama-3.1-8b", "tpu:v6e:2x2", 1),
    Case("llama-3.1-8b", "tpu:v5e:2x2", 4),
    Case("llama-3.1-8b", "tpu:v5e:2x4", 8),
    Case("llama-3.1-8b", "tpu:tpu7x:2x2x1", 8),
    Case("llama-3.1-70b", "tpu:v6e:2x4", 8),
    Case("llama-3.1-70b", "tpu:v5p:2x2x2", 8),
    Case("qwen3-30b-a3b", "tpu:v6e:2x2", 4),
    Case("gemma-3-27b", "tpu:v6e:2x2", 4),
    Case("gpt-oss-20b", "tpu:v6e:2x2", 4),
    Case("deepseek-v2-lite", "tpu:v6e:2x2", 4),
    Case("falcon-h1-7b", "tpu:v6e:2x2", 4),
]


@pytest.mark.tpu
@pytest.mark.parametrize("step", ["decode 64", "forward 512"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_models(case: Case, step: str, tmp_path: Path) -> None:
    build = plan(write_config(tmp_path, case.model), case.target, case.devices, **SIZES)
    compiled = compile_step(build, step)
    check_step(build, compiled)
    config = json.loads((MODELS / case.model / "config.json").read_text())
    collectives = count_collectives(compiled.as_text())
    if case.devices == 1:
        assert not collectives
    else:
        is_vocabulary_cut = config["vocab_size"] % case.devices == 0
        assert collectives.pop("all-gather", 0) == is_vocabulary_cut
        assert sum(collectives.values()) == 2 * config["num_hidden_layers"] + is_vocabulary_cut


@pytest.mark.tpu
@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v2-lite", "falcon-h1-7b"])
def test_two_layers_of_other_kinds_on_every_chip(model: str, target: str, tmp_path: Path) -> None:
    """Experts, latents, and a state beside the pages."""
    build = plan(write_config(tmp_path, model, num_hidden_layers=2), target, 4, **SIZES)
    check_step(build, compile_step(build, "decode 64"))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "devices"), [("tpu:v6e:2x2", 4), ("tpu:v5p:2x2x1", 1)])
def test_what_cannot_fit_says_so(target: str, devices: int, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"need [\d.]+ GiB of [\d.]+ GiB on each device.*Raise .*--tensor-parallel-size"):
        plan(write_config(tmp_path, "llama-3.1-70b"), target, devices, **SIZES)
