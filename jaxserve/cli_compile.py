"""`jaxserve compile --target`, and what the command line shows of programs and of how far a start-up is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxserve.config import GIB, EngineConfig
from jaxserve.server.config import MIB

if TYPE_CHECKING:
    from jaxserve.programs import ProgramReport


def compile_for_target(config: EngineConfig, name: str) -> int:
    """Compiles for devices that are not there; 0 if the model fits."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is compiled for absent devices cannot be read back
    os.environ["JAX_PLATFORMS"] = "cpu"  # this machine's own accelerator is not meant, and may be in use
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "3"
    )  # XLA takes memory that is not there for an error; what fails is raised anyhow
    from jaxserve.tpu import compile as compiling
    from jaxserve.tpu.target import open_target

    target, started_s = open_target(name), time.monotonic()
    with show_progress() as on_progress:
        report = compiling.compile_for_target(config, target, on_progress=on_progress)
    used = f"{config.parallel.tensor_parallel_size} of the {len(target.devices)} devices of {name}"
    if report.reason is not None:
        print(f"does not fit on {used}: {report.reason}")
        return 1
    print_reports(report.programs, time.monotonic() - started_s, target.memory)
    print(f"compiled for {used}; nothing has run. Of {target.memory / GIB:.1f} GiB a device:")
    print(f"  {report.resident_bytes / GIB:.2f} GiB for weights and states")
    print(f"  {report.temporary_bytes / GIB:.2f} GiB for what a program needs besides while it runs")
    print(f"  {report.pool_bytes / GIB:.2f} GiB for the pool")
    print(f"fits: room for {report.kv_tokens:,} tokens of keys and values")
    return 0


def print_reports(reports: Sequence[ProgramReport], seconds: float, memory: int | None = None) -> None:
    """memory: bytes of a device, to be told how much of it each program fills."""
    from rich.console import Console
    from rich.table import Table

    table = Table("program", show_edge=False)
    for name in ("seconds", "temporary MiB", "argument MiB", *(() if memory is None else ("of a device",))):
        table.add_column(name, justify="right")
    for report in sorted(reports, key=lambda report: -report.seconds):
        sizes = [f"{size / MIB:,.1f}" for size in (report.temp_bytes, report.argument_bytes)]
        share = [] if memory is None else [f"{(report.temp_bytes + report.argument_bytes + report.output_bytes) / memory:.1%}"]
        table.add_row(report.name, f"{report.seconds:.2f}", *sizes, *share)
    Console().print(table)
    print(f"{len(reports)} programs in {seconds:.1f} s")


@contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of the start-up, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield show
