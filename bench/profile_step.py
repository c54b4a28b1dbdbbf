"""Where a decode step's time goes: the host's share, the device's share, and the kernels that take the most.

usage: python bench/profile_step.py MODEL [--batch 1 64 256] [--context 256] [--prefill 4096 4096]
"""

from __future__ import annotations

import argparse
import collections
import glob
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve import LLM, SamplingParams
from jaxserve.plan import ON_DEVICE, PlanBuffer
from jaxserve.sampler import Mode

HERE = Path(__file__).parent


def timed(owner: Any, name: str, totals: dict[str, float]) -> None:
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        totals[name] += time.perf_counter() - start
        return result

    setattr(owner, name, wrapper)


def host_times(llm: LLM, batch: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds a step in each part of the engine's loop; collect is where the host waits for the device."""
    engine, totals = llm.engine, collections.defaultdict(float)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=steps + 20, detokenize=False)
    rng = np.random.default_rng(batch)
    ids = [engine.add_request(rng.integers(0, engine.vocab_size, context).tolist(), params) for _ in range(batch)]
    while len(engine.scheduler.running) < batch or any(r.num_to_compute > 1 for r in engine.scheduler.running):
        engine.step()
    saved = {
        (o, n): getattr(o, n)
        for o, n in [
            (engine.scheduler, "schedule"),
            (engine.runner, "dispatch"),
            (engine.runner._packer, "pack"),
            (engine.runner, "_sample"),
            (engine.runner, "collect"),
            (engine, "_take_in"),
            (engine.runner, "_send"),
        ]
    }
    for owner, name in saved:
        timed(owner, name, totals)
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    totals["step"] = time.perf_counter() - start
    for owner, name in saved:
        delattr(owner, name)
    for request_id in ids:
        engine.abort(request_id)
    engine.step()
    return {name: round(t / steps * 1000, 3) for name, t in totals.items()}


def device_times(llm: LLM, rows: list[tuple[int, int]], trace: str | None = None) -> dict[str, float]:
    """Milliseconds a call of the forward and the sample program, called again and again without the host in between.

    Args:
        rows: (tokens, position of the first) of each request of the step.
    """
    runner = llm.engine.runner
    batch, tokens = len(rows), [n for n, _ in rows]
    shape = runner.buckets.choose(batch, sum(tokens), batch, 0)
    buffer = PlanBuffer(shape, runner._inputs.num_slots)
    decode = sum(tokens) == batch
    buffer.token_ids[: sum(tokens)] = ON_DEVICE if decode else np.random.default_rng(1).integers(0, 1000, sum(tokens))
    buffer.row_slot[:batch] = range(batch)
    buffer.row_position[:batch] = [position for _, position in rows]
    buffer.row_tokens[:batch] = tokens
    buffer.num_single_rows[0] = batch if decode else 0
    buffer.logit_rows[:batch] = np.cumsum(tokens) - 1
    buffer.samples[:batch, 0] = range(batch)
    width = max(map(sum, rows)) // runner.buckets.page_size + 1
    tables = np.random.default_rng(0).permutation(llm.engine.scheduler.pool.num_pages)[: 256 * width]
    table = np.zeros((runner.buckets.num_tables, runner._inputs.num_slots, runner.buckets.pages_per_slot), np.int32)
    table[:, :batch, :width] = np.resize(tables, (batch, width))  # groups may read each other's pages: only time counts
    table = table.reshape(-1, runner.buckets.pages_per_slot)
    state = type(runner._state)(runner._state.caches, jax.device_put(table, runner._inputs.shardings.replicated))
    buffer.packed = np.resize(buffer.packed, runner.buckets.plan_size)
    stage = runner.programs.named("stage")
    forward, sample = (
        runner.programs.forward(shape),
        runner.programs.sample(shape.num_samples, runner.programs.sample_mode(Mode.GREEDY)),
    )
    last, packed, results = runner._last_tokens, runner._packed, runner._results[shape.num_samples]

    def loop(count: int) -> float:
        nonlocal state, last, packed, results
        start = time.perf_counter()
        for _ in range(count):
            packed = stage(runner._send(buffer.packed), packed)
            state, results = forward(runner._weights.arrays, state, last, packed, results)
            last, _, _ = sample(results, last, None)
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / count * 1000

    loop(3)
    result = {"forward_and_sample_ms": round(min(loop(50), loop(50)), 3)}
    start = time.perf_counter()
    for _ in range(20):
        state, results = forward(runner._weights.arrays, state, last, packed, results)
    result["dispatch_forward_ms"] = round((time.perf_counter() - start) / 20 * 1000, 3)
    jax.block_until_ready(results)
    if trace is not None:
        with jax.profiler.trace(trace):
            loop(5)
    runner._state, runner._last_tokens, runner._packed = state, last, packed
    runner._results[shape.num_samples] = results
    return result


def kernels(trace: str, calls: int = 5, top: int = 22) -> list[tuple[str, float, int]]:
    """The kernels with the most device time: (name, microseconds a step, launches a step)."""
    from jax.profiler import ProfileData

    path = glob.glob(f"{trace}/**/*.xplane.pb", recursive=True)[0]
    times: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for plane in ProfileData.from_file(path).planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                times[event.name] += event.duration_ns / 1000 / calls
                counts[event.name] += 1
    rows = sorted(((n[:70], round(t, 1), counts[n] // calls) for n, t in times.items()), key=lambda r: -r[1])
    return [("total", round(sum(times.values()), 1), sum(counts.values()) // calls), *rows[:top]]


def show(llm: LLM, rows: list[tuple[int, int]]) -> None:
    trace = tempfile.mkdtemp()
    print(json.dumps(device_times(llm, rows, trace)), flush=True)
    try:
        for row in kernels(trace):
            print("  ", *row, flush=True)
    except (IndexError, OSError, ValueError) as e:  # the trace is extra
        print("no trace:", type(e).__name__, e)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, nargs="*", help="lengths of the prompts of a prefill step")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    options = {k: json.loads(v) for k, _, v in (o.partition("=") for o in args.option)}
    engine = {"dtype": "bfloat16", "max_model_len": 8192, "skip_tokenizer_init": True, "load_format": "dummy"}
    start = time.perf_counter()
    llm = LLM(str(HERE / "models" / args.model), **(engine | options))
    print(f"start {time.perf_counter() - start:.1f} s", llm.engine.description, flush=True)
    for report in sorted(llm.engine.runner.programs.reports, key=lambda r: -r.seconds)[:8]:
        print("  ", report.name, f"{report.seconds:.1f} s, {report.trace_seconds:.1f} of them tracing", flush=True)
    for batch in args.batch:
        print(f"== batch {batch}", json.dumps(host_times(llm, batch, args.context, 60)), flush=True)
        show(llm, [(1, args.context)] * batch)
    if args.prefill:
        print(f"== prefill {args.prefill}", flush=True)
        show(llm, [(length, 0) for length in args.prefill])


if __name__ == "__main__":
    main()
