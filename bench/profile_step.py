"""Where a decode step's time goes: the host's share, the device's share, its idle time, and the kernels that take the most.

usage: python bench/profile_step.py MODEL [--batch 1 64 256] [--context 256] [--prefill 4096 4096] [--out FILE]

idle_share is the part of the time in which neither a kernel nor a copy runs, from the middle eight tenths of a trace of the engine's own loop: the
device has been drained before the trace begins. Of the whole trace it is idle_share_whole. Tracing makes the host slower: where traced_step_ms
is above around_ms, a step's time without it, the device may wait for the tracing.
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
from jaxserve.sampling_params import OutputKind

HERE = Path(__file__).parent
STEPS = 40  # of each measurement


def timed(owner: Any, name: str, totals: dict[str, float]) -> None:
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        totals[name] += time.perf_counter() - start
        return result

    setattr(owner, name, wrapper)


class Decoding:
    """Requests that decode on and on, in the engine's own loop."""

    def __init__(self, llm: LLM, batch: int, context: int, steps: int) -> None:
        engine = self.engine = llm.engine
        final = OutputKind.FINAL_ONLY
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=steps, detokenize=False, output_kind=final)
        rng = np.random.default_rng(batch)
        self.ids = [engine.add_request(rng.integers(0, engine.vocab_size, context).tolist(), params) for _ in range(batch)]
        while len(engine.scheduler.running) < batch or any(r.num_to_compute > 1 for r in engine.scheduler.running):
            engine.step()
        self.step(20)

    def step(self, count: int) -> float:
        """Milliseconds a decode step, of `count` or some more: the engine may dispatch several at a time."""
        request = self.engine.scheduler.running[0]
        before, start = request.num_computed, time.perf_counter()
        while request.num_computed < before + count:
            self.engine.step()
        return (time.perf_counter() - start) / (request.num_computed - before) * 1000

    def stop(self) -> None:
        for request_id in self.ids:
            self.engine.abort(request_id)
        self.engine.step()


def host_times(decoding: Decoding, steps: int) -> dict[str, float]:
    """Milliseconds a step in each part of the engine's loop; collect is where the host waits for the device."""
    engine, totals = decoding.engine, collections.defaultdict(float)
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
    step_ms = min(decoding.step(steps), decoding.step(steps))
    for owner, name in saved:
        timed(owner, name, totals)
    totals_ms = decoding.step(steps)
    for owner, name in saved:
        delattr(owner, name)
    return {"step": round(step_ms, 3), "step_timed": round(totals_ms, 3)} | {
        name: round(t / steps * 1000, 3) for name, t in totals.items()
    }


def idle_times(decoding: Decoding, steps: int) -> dict[str, float]:
    """From a trace of the engine's steps; see the top of this file. Empty where the trace knows no GPU."""
    trace = tempfile.mkdtemp()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    request, runner = decoding.engine.scheduler.running[0], decoding.engine.runner
    before_ms = decoding.step(steps)
    jax.block_until_ready(runner._last_tokens)  # what is under way now is not the trace's
    before = request.num_computed
    with jax.profiler.trace(trace, profiler_options=options):
        traced_ms = decoding.step(steps)
        jax.block_until_ready(runner._last_tokens)
    traced = request.num_computed - before
    around_ms = (before_ms + decoding.step(steps)) / 2
    intervals = device_intervals(trace)
    if not intervals:
        return {}
    begin, end = min(start for start, _ in intervals), max(stop for _, stop in intervals)
    tenth = (end - begin) / 10
    found = {
        "idle_share": idle_share(intervals, begin + tenth, end - tenth),
        "idle_share_whole": idle_share(intervals, begin, end),
        "events_per_step": len(intervals) / traced,
        "around_ms": around_ms,
        "traced_step_ms": traced_ms,
    }
    return {name: round(x, 4) for name, x in found.items()}


def device_intervals(trace: str) -> list[tuple[float, float]]:
    """Start and end, in ns, of all that ran on the GPU's streams."""
    return [(e.start_ns, e.start_ns + e.duration_ns) for line in gpu_streams(trace) for e in line.events]


def idle_share(intervals: list[tuple[float, float]], begin: float, end: float) -> float:
    """The part of the time from begin to end in which none of the intervals lasts."""
    busy, at = 0.0, begin
    for start, stop in sorted(intervals):
        stop = min(stop, end)
        busy += max(stop - max(start, at), 0.0)
        at = max(at, stop)
    return 1 - busy / (end - begin)


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
    replicated = runner._inputs.shardings.replicated
    runner._state = type(runner._state)(runner._state.caches, jax.device_put(table, replicated))
    packed = np.resize(buffer.packed, runner.buckets.plan_size)
    mode = runner.programs.sample_mode(Mode.GREEDY)

    def loop(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            runner.run(shape, packed, mode, batch)
        jax.block_until_ready(runner._last_tokens)
        return (time.perf_counter() - start) / count * 1000

    loop(3)
    result = {"forward_and_sample_ms": round(min(loop(50), loop(50)), 3)}
    start = time.perf_counter()
    for _ in range(20):
        runner.run(shape, packed, mode, batch)
    result["dispatch_ms"] = round((time.perf_counter() - start) / 20 * 1000, 3)
    jax.block_until_ready(runner._last_tokens)
    if trace is not None:
        with jax.profiler.trace(trace):
            loop(5)
    return result


def gpu_streams(trace: str) -> list[Any]:
    """The lines of a trace on which kernels and copies are, one for each stream."""
    from jax.profiler import ProfileData

    path = glob.glob(f"{trace}/**/*.xplane.pb", recursive=True)[0]
    planes = [plane for plane in ProfileData.from_file(path).planes if "GPU" in plane.name]
    return [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]


def kernels(trace: str, calls: int = 5, top: int = 22) -> list[tuple[str, float, int]]:
    """The kernels with the most device time: (name, microseconds a step, launches a step)."""
    times: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for line in gpu_streams(trace):
        for event in line.events:
            times[event.name] += event.duration_ns / 1000 / calls
            counts[event.name] += 1
    rows = sorted(((n[:70], round(t, 1), counts[n] // calls) for n, t in times.items()), key=lambda r: -r[1])
    return [("total", round(sum(times.values()), 1), sum(counts.values()) // calls), *rows[:top]]


def show(llm: LLM, rows: list[tuple[int, int]]) -> dict[str, Any]:
    """Prints and returns what the device takes for a step of these rows."""
    trace = tempfile.mkdtemp()
    found: dict[str, Any] = device_times(llm, rows, trace)
    print(json.dumps(found), flush=True)
    try:
        found["kernels"] = kernels(trace)
    except (IndexError, OSError, ValueError) as e:  # the trace is extra
        print("no trace:", type(e).__name__, e)
    for row in found.get("kernels", ()):
        print("  ", *row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, nargs="*", help="lengths of the prompts of a prefill step")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the result is written, as JSON, after each batch")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    options = {k: json.loads(v) for k, _, v in (o.partition("=") for o in args.option)}
    engine = {"dtype": "bfloat16", "max_model_len": 8192, "skip_tokenizer_init": True, "load_format": "dummy"}
    start = time.perf_counter()
    llm = LLM(str(HERE / "models" / args.model), **(engine | options))
    print(f"start {time.perf_counter() - start:.1f} s", llm.engine.description, flush=True)
    for report in sorted(llm.engine.runner.programs.reports, key=lambda r: -r.seconds)[:8]:
        print("  ", report.name, f"{report.seconds:.1f} s, {report.trace_seconds:.1f} of them tracing", flush=True)
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "model": args.model, "context": args.context, "batches": {}}
    for batch in args.batch:
        decoding = Decoding(llm, batch, args.context, 60 + 6 * STEPS)
        found = host_times(decoding, STEPS) | idle_times(decoding, STEPS)
        decoding.stop()
        print(f"== batch {batch}", json.dumps(found), flush=True)
        result["batches"][batch] = found | show(llm, [(1, args.context)] * batch)
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.prefill:
        print(f"== prefill {args.prefill}", flush=True)
        show(llm, [(length, 0) for length in args.prefill])


if __name__ == "__main__":
    main()
