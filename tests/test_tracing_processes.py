"""Programs traced by another process are those that this one would trace; where it fails, this one traces."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from jax import export

from jaxserve import tracing_processes
from jaxserve.build import Build
from jaxserve.compiling import Tracers
from jaxserve.config import EngineConfig
from jaxserve.models.loading import open_source
from jaxserve.programs import Program, declare_programs
from jaxserve.sharding import make_mesh
from jaxserve.startup import plan_build
from jaxserve.trace_cache import trace_here
from jaxserve.tracing_child import answer_all
from tests.goldens import cases


@pytest.fixture
def build(tmp_path: Path) -> Build:
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("llama")))
    options = {"load_format": "dummy", "max_model_len": 64, "num_gpu_blocks_override": 8}
    config = EngineConfig.from_options(model=str(tmp_path), **options)
    return plan_build(config, open_source(config.model.model, "dummy"), make_mesh(1))


def program_of(build: Build) -> Program:
    programs = declare_programs(build.inputs(), build.model.apply, build.runtime)
    return next(program for program in programs if program.name.startswith("sample 1 "))


def answers_to(*orders: Any) -> list[Any]:
    """What the process says to an order and to names of programs."""
    said = io.BytesIO()
    answer_all(io.BytesIO(b"".join(map(pickle.dumps, orders))), said)
    said.seek(0)
    return [pickle.load(said) for _ in orders]


def lowered(program: Program, exported: export.Exported) -> str:
    return program.jitted(exported.call).lower(*program.arguments).as_text()


def test_another_process_traces_the_same(build: Build) -> None:
    program = program_of(build)
    ready, traced, unknown = answers_to(tracing_processes.order_for(build), program.name, "nonsense")
    assert ready is None and unknown == "KeyError: 'nonsense'"
    assert lowered(program, export.deserialize(traced)) == lowered(program, trace_here(program, "cpu"))


def test_it_refuses_when_its_source_code_is_another(build: Build) -> None:
    order = replace(tracing_processes.order_for(build), source="edited since")
    (said,) = answers_to(order)
    assert "source code has changed" in said


@pytest.mark.parametrize("command", [["true"], ["sleep", "600"]], ids=["ends", "hangs"])
def test_what_a_failed_process_was_to_trace_is_traced_here(
    command: list[str], build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing_processes, "PATIENCE_S", 0.1)
    tracers: Tracers = SimpleQueue()
    process = tracing_processes._TracingProcess(command, b"an order", tracers)
    program = program_of(build)
    traced = process.trace(program, "cpu")
    process.end()
    assert lowered(program, traced) == lowered(program, trace_here(program, "cpu"))
    assert tracers.empty() and f"{program.name} is traced here" in caplog.text


@pytest.mark.parametrize("untraced, cores, count", [(14, 16, 5), (14, 8, 2), (14, 4, 0), (3, 16, 0)])
def test_processes_are_for_many_programs_and_cores(
    build: Build, monkeypatch: pytest.MonkeyPatch, untraced: int, cores: int, count: int
) -> None:
    begun: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], order: bytes, tracers: Tracers) -> None:
            begun.append(command)

        def end(self) -> None:
            begun.pop()

    monkeypatch.setattr(tracing_processes, "_TracingProcess", Process)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    with tracing_processes.tracing_processes(build, SimpleQueue(), untraced):
        assert len(begun) == count
    assert not begun


def test_a_start_goes_on_without_processes(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(command: list[str], **options: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    tracers: Tracers = SimpleQueue()
    with tracing_processes.tracing_processes(build, tracers, 14):
        assert tracers.empty()
    assert "no memory" in caplog.text
