"""how long a start takes, the first with an empty compile cache and the second with what that left

Each start is a process of its own, timed by its phases: seconds since the process began until jax and jaxserve are imported, the
first program is compiled, the last one is, the weights are there (they load meanwhile), the engine is ready, and a token has come.
Beside that, what programs took to trace and to compile, several at once, and when each was done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve import uncollected
from jaxserve.cli_engine import ENGINE_OPTIONS, add_engine_flags, engine_config
from jaxserve.cli_flags import read_options
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from jaxserve.programs import ProgramReport

_CHILD = "import sys, jaxserve.cli_bench.startup as startup; startup.start_once(sys.argv[1])"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="what serve takes")
    parser.add_argument("--starts", type=int, default=2, help="how many, the first with an empty cache (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the result is written too")
    parser.add_argument("--config", metavar="FILE", help="YAML file of engine options; flags win over it")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> None:
    options = read_options(args, ENGINE_OPTIONS)
    engine_config(options)  # says what is wrong with them, before any start; and no device is taken here
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps(options | {"compilation_cache_dir": str(Path(folder) / "cache")})
        starts = [_start(given) for _ in range(args.starts)]
    result = json.dumps({"model": args.model, "command": " ".join(["jaxserve", *sys.argv[1:]]), "starts": starts}, indent=1)
    print(result)
    if args.output is not None:
        args.output.write_text(result + "\n", encoding="utf-8")


def _start(options: str) -> dict[str, Any]:
    began_s = time.time()
    child = subprocess.run([sys.executable, "-c", _CHILD, options], stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise JaxserveError(f"the start failed with status {child.returncode}; what it said is above")
    marks: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return _since(began_s, marks)


def _since(began_s: float, marks: dict[str, Any]) -> dict[str, Any]:
    """The marks, with times of the clock as seconds since then."""
    since = {name: round(value - began_s, 2) for name, value in marks.items() if name.endswith("_at_s")}
    deeper = {name: _since(began_s, value) for name, value in marks.items() if isinstance(value, dict)}
    return marks | since | deeper


def start_once(options: str) -> None:
    """One start, in the process that is there for it; prints its marks as JSON, in seconds of the wall clock."""
    config = engine_config(json.loads(options))
    from jaxserve.devices import expect_devices

    expect_devices()
    from jaxserve import LLM, SamplingParams

    with uncollected():
        from jaxserve.startup import build_engine

    marks: dict[str, Any] = {"imported_at_s": time.time()}

    def on_progress(stage: str, done: int, total: int) -> None:
        now = time.time()
        if stage.startswith("compile"):
            marks.setdefault("first_program_at_s", now)
            marks["programs_at_s"] = now
        elif done == total:
            marks["weights_at_s"] = now

    engine = build_engine(config, on_progress=on_progress)
    marks["ready_at_s"] = time.time()
    with LLM.from_engine(engine) as llm:
        llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        marks["first_token_at_s"] = time.time()
        marks |= {"device": next(iter(engine.params.values())).devices().pop().device_kind, **_sums(engine)}
    print(json.dumps(marks))


def _sums(engine: Any) -> dict[str, Any]:
    engines = getattr(engine, "engines", [engine])
    reports = [report for one in engines for report in one.runner.programs.reports]
    return {
        "programs": len(reports),
        "traced_for_s": round(sum(report.trace_seconds for report in reports), 2),
        "compiled_for_s": round(sum(report.seconds - report.trace_seconds for report in reports), 2),
        "by_program": {report.name: _of_program(report) for report in reports},
    }


def _of_program(report: ProgramReport) -> dict[str, float]:
    compile_seconds = report.seconds - report.trace_seconds
    return {
        "traced_for_s": round(report.trace_seconds, 2),
        "compiled_for_s": round(compile_seconds, 2),
        "done_at_s": report.done_s,
    }
