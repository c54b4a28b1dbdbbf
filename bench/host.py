"""The host's time of one step (schedule, pack, take in), with a runner that costs nothing. Needs no device.

usage: python bench/host.py [--rows 256 1024] [--out FILE] [--profile]

Every request decodes; lengths differ, so that pages run full in different steps. A step is Engine.step: what it takes is what the
device would wait for if it were infinitely fast. `stream` shows every token as text (DELTA, SmolLM2's tokenizer) to an observer;
`offline` is what LLM.generate does with token ids.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.buckets import choose_buckets
from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.limits import Limits
from jaxserve.metrics import FinishedStats, StepStats, TokenStats
from jaxserve.packing import Packer
from jaxserve.page_pool import PagePool
from jaxserve.prefix_cache import PrefixCache
from jaxserve.request import Request
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import StepPlan
from jaxserve.step_runner import InFlight

PAGE_SIZE = 16
MAX_MODEL_LEN = 8192
MAX_TOKENS = 8192  # of a step
VOCAB = 32_000


class NoDevice:
    """A StepRunner that packs plans and answers with some tokens at once."""

    def __init__(self, max_num_seqs: int) -> None:
        pages_per_slot = MAX_MODEL_LEN // PAGE_SIZE
        self.buckets = choose_buckets("gpu", max_num_seqs, MAX_TOKENS, pages_per_slot, PAGE_SIZE)
        self._packer = Packer(self.buckets, max_num_seqs)
        self._tokens = np.random.default_rng(0).integers(1000, VOCAB, 2 * max_num_seqs, dtype=np.int32)

    def dispatch(self, plan: StepPlan) -> InFlight:
        rows = plan.sample_rows()
        self.pack(plan, rows)
        return InFlight(plan, rows, {"tokens": self._tokens[: len(plan.decodes) + len(rows)]})

    def pack(self, plan: StepPlan, rows: Any) -> None:
        self._packer.pack(plan, rows)

    def is_ready(self, step: InFlight) -> bool:
        return True

    def collect(self, step: InFlight) -> dict[str, Any]:
        return step.outputs

    def set_shaping(self, request: Request) -> None: ...

    def reset(self) -> None: ...

    def shutdown(self) -> None: ...


class Listener:
    """An Observer that only listens."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_tokens(self, stats: TokenStats) -> None: ...

    def on_finished(self, stats: FinishedStats) -> None: ...


def make_engine(rows: int, num_pages: int, *, stream: bool) -> Engine:
    """An engine around NoDevice, with room for so many requests."""
    runner = NoDevice(rows)
    pool = PagePool(num_pages)
    limits = Limits(rows, MAX_TOKENS, runner.buckets.max_page_updates)
    scheduler = Scheduler(limits, pool, PAGE_SIZE, PrefixCache(pool))
    config = EngineConfig.from_options(model="none", max_model_len=MAX_MODEL_LEN)
    tokenizer = None
    if stream:
        from jaxserve.models.loading.resolve import resolve_model
        from jaxserve.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(resolve_model("smollm2"))
    return Engine(config, scheduler, runner, tokenizer, vocab_size=VOCAB, observer=Listener() if stream else None)


def add_requests(engine: Engine, count: int, max_tokens: int, *, stream: bool) -> None:
    kind = OutputKind.DELTA if stream else OutputKind.FINAL_ONLY
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens, detokenize=stream, output_kind=kind)
    rng = np.random.default_rng(count)
    for n in rng.integers(64, 192, count).tolist():
        engine.add_request(rng.integers(1000, VOCAB, n).tolist(), params)


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Notes what each call of a method takes."""
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, wrapper)


def measure(
    rows: int, num_pages: int, *, stream: bool = False, waiting: int = 0, steps: int = 320, profile: bool = False
) -> dict[str, Any]:
    """Milliseconds of a step, over steps in which every request decodes."""
    engine = make_engine(rows, num_pages, stream=stream)
    add_requests(engine, rows + waiting, steps + 100, stream=stream)
    while len(engine.scheduler.running) < rows or any(r.num_to_compute > 1 for r in engine.scheduler.running):
        engine.step()
    for _ in range(20):
        engine.step()
    whole = []
    for _ in range(steps // 2):
        start = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - start)
    parts: dict[str, list[float]] = {"schedule": [], "pack": [], "take_in": []}
    for owner, name, part in (
        (engine.scheduler, "schedule", "schedule"),
        (engine.runner, "pack", "pack"),
        (engine, "_take_in", "take_in"),
    ):
        timed(owner, name, parts[part])
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    for _ in range(steps // 2):
        engine.step()
    profiler.disable()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    assert len(engine.scheduler.running) == rows, "the requests were to run all the time"
    spread = np.quantile(whole, [0.5, 0.95])
    return {
        "rows": rows,
        "pages": num_pages,
        "waiting": waiting,
        "stream": stream,
        "step_ms": round(statistics.mean(whole) * 1e3, 3),
        "step_ms_p50_p95": [round(float(q) * 1e3, 3) for q in spread],
        **{f"{name}_ms": round(statistics.mean(seconds) * 1e3, 3) for name, seconds in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--pages", type=int, nargs="+", default=[100_000])
    parser.add_argument("--waiting", type=int, nargs="+", default=[0])
    parser.add_argument("--stream", action="store_true", help="also with text, shown token by token, to an observer")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, which then is more")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = []
    for stream in (False, True) if args.stream else (False,):
        for rows in args.rows:
            for num_pages in args.pages:
                for waiting in args.waiting:
                    runs.append(measure(rows, num_pages, stream=stream, waiting=waiting, profile=args.profile))
                    print(runs[-1], flush=True)
    if args.out:
        result = {"command": " ".join(["python", *sys.argv]), "python": sys.version.split()[0], "runs": runs}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
