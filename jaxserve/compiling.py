"""Compiles the declared programs: traced by one or several, each in its turn, while XLA compiles those before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from threading import Semaphore
from typing import Any

import jax

from jaxserve import step
from jaxserve.models.interface import Runtime
from jaxserve.programs import Program, ProgramInputs, ProgramReport, Programs, declare_programs, temporary_bytes
from jaxserve.trace_cache import Trace, TraceCache, trace_here

Progress = Callable[[str, int, int], None]
"""(stage, done, total): what start-up reports."""

Tracers = SimpleQueue[Trace]
"""Those that are idle."""

FindTracers = Callable[[Sequence[Program], Tracers], AbstractContextManager[None]]
"""Adds tracers for these programs, for as long as its context lasts."""


class Turns:
    """Who may trace, and how many may compile at a time.

    Attributes:
        tracers: this process, one program at a time, and whatever joins it.
    """

    def __init__(self, threads: int = 1) -> None:
        self.tracers: Tracers = SimpleQueue()
        self.tracers.put(trace_here)
        self.to_compile = Semaphore(threads)

    @contextmanager
    def to_trace(self) -> Iterator[Trace]:
        """An idle tracer, until the context ends."""
        tracer = self.tracers.get()
        try:
            yield tracer
        finally:
            self.tracers.put(tracer)


def compile_programs(
    inputs: ProgramInputs,
    apply_model: step.ApplyModel,
    runtime: Runtime,
    on_progress: Progress | None = None,
    *,
    traces: TraceCache | None = None,
    threads: int = 8,
    find_tracers: FindTracers | None = None,
) -> Programs:
    """Compiles the whole list, `threads` at once. Each tracer traces one at a time, so that the first is soon with XLA."""
    *programs, smallest = declare_programs(inputs, apply_model, runtime)
    # Alone, before the threads: of two that open jax's compile cache at once, one may be told that there is none.
    executable, report = compile_program(smallest, runtime, traces)
    compiled, reports = {smallest.key: executable}, [report]
    turns = Turns(threads)
    found = nullcontext() if find_tracers is None else find_tracers(programs, turns.tracers)
    with found, ThreadPoolExecutor(len(programs)) as pool:
        jobs = {pool.submit(compile_program, program, runtime, traces, turns): program for program in programs}
        for job in as_completed(jobs):
            compiled[jobs[job].key], report = job.result()
            reports.append(report)
            if on_progress is not None:
                on_progress("compile", len(reports), len(jobs) + 1)
    return Programs(compiled, tuple(reports))


def compile_program(
    program: Program,
    runtime: Runtime,
    traces: TraceCache | None = None,
    turns: Turns | None = None,
) -> tuple[jax.stages.Compiled, ProgramReport]:
    """Compiles one program for the devices of the runtime's mesh, when its turn comes."""
    turns = turns or Turns()
    with turns.to_trace() as trace, on_target(runtime):
        started_s = time.monotonic()
        lowered = program.jitted().lower(*program.arguments) if traces is None else traces.lower(program, runtime.platform, trace)
        trace_seconds = time.monotonic() - started_s
    with turns.to_compile:
        started_s = time.monotonic()
        compiled = lowered.compile(compiler_options=program.options)
        seconds, memory = trace_seconds + time.monotonic() - started_s, compiled.memory_analysis()
    temporary, arguments = (0, 0) if memory is None else (memory.temp_size_in_bytes, memory.argument_size_in_bytes)
    outputs = temporary_bytes(compiled) - temporary
    return compiled, ProgramReport(program.name, trace_seconds, seconds, temporary, arguments, outputs, time.time())


def on_target(runtime: Runtime) -> AbstractContextManager[Any]:
    """Tells Pallas which TPU or GPU it is for: it asks the mesh at hand, else jax.devices(), where there may be none."""
    assert runtime.mesh is not None
    asks = runtime.platform == "tpu" or runtime.platform != jax.default_backend()
    return jax.sharding.use_abstract_mesh(runtime.mesh.abstract_mesh) if asks else nullcontext()
