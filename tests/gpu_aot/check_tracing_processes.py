"""A real process traces a step's kernels for an H100 that is not there, as this one would."""

from __future__ import annotations

import re
from pathlib import Path
from queue import SimpleQueue

import pytest
from jax import export

from jaxserve.compiling import Tracers, on_target
from jaxserve.config import EngineConfig
from jaxserve.programs import Program, declare_programs
from jaxserve.tpu.compile import plan_for
from jaxserve.tpu.target import open_target
from jaxserve.trace_cache import trace_here
from jaxserve.tracing_processes import tracing_processes

_KERNEL = re.compile(r'(_hash|module) = "[^"]*"')  # says in which lines its tracing met a cache
MODEL = Path(__file__).parents[2] / "bench/models/qwen3-0.6b"


@pytest.mark.parametrize("devices", [1, 2])
def test_a_process_traces_what_this_one_would(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"load_format": "dummy", "max_model_len": 1024, "num_gpu_blocks_override": 256, "tensor_parallel_size": devices}
    config = EngineConfig.from_options(model=str(MODEL), **options)
    build = plan_for(config, open_target(f"gpu:h200:{devices}"))
    program = next(p for p in declare_programs(build.inputs(), build.model.apply, build.runtime) if p.name == "decode 16")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    tracers: Tracers = SimpleQueue()
    with tracing_processes(build, tracers, untraced=4), on_target(build.runtime):
        assert _lowered(program, tracers.get()(program, "gpu")) == _lowered(program, trace_here(program, "gpu"))


def _lowered(program: Program, exported: export.Exported) -> str:
    text = program.jitted(exported.call).lower(*program.arguments).as_text()
    assert "mosaic_gpu" in text
    return _KERNEL.sub(r"\1", text)
