"""Processes that trace programs for this one, whose Python runs one thread at a time. Knows the child by its pipe alone.

Most of a first start on a GPU is tracing, and most of that the kernels' lowering, in Python. The processes get the whole Build but
for its devices, so that nothing is read or decided twice; what they trace for is an H100 that need not be there (absent_gpu.py).
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any

import jax
from jax import export

from jaxserve.trace_cache import source_digest, trace_here

if TYPE_CHECKING:
    from jaxserve.build import Build
    from jaxserve.compiling import Tracers
    from jaxserve.programs import Program

log = logging.getLogger(__name__)

MAX_PROCESSES = 5
PATIENCE_S = 120.0  # for an answer, which takes seconds; a process that hangs is ended
_CORES_EACH = 3  # as XLA compiles meanwhile
_WORTH_IT = 4  # programs; a process takes as long to start as one takes to be traced
_CHILD = ["-P", "-c", "import jaxserve.tracing_child as child; child.main()"]


@dataclass(frozen=True)
class Order:
    """What a process is told at first; names of programs follow.

    Attributes:
        build: what declares the programs, its devices taken out.
        settings: this process' own of jax.
        source: the digest of the source code that this process runs.
    """

    build: Build
    num_devices: int
    settings: dict[str, Any]
    source: str


def order_for(build: Build) -> Order:
    settings = {name: value for name, value in jax.config.values.items() if isinstance(value, bool | int | float | str | None)}
    return Order(build.on_mesh(None), build.shardings.mesh.size, settings, source_digest())


@contextmanager
def tracing_processes(build: Build, tracers: Tracers, untraced: int) -> Iterator[None]:
    """While inside, processes join the tracers as soon as they have started, if there are cores for them and enough to trace."""
    count = min(MAX_PROCESSES, (os.cpu_count() or 1) // _CORES_EACH)
    if untraced < _WORTH_IT or count < 2 or not sys.executable:
        yield
        return
    with ExitStack() as processes:
        try:
            order = pickle.dumps(order_for(build))
            for _ in range(count):
                processes.callback(_TracingProcess([sys.executable, *_CHILD], order, tracers).end)
        except (OSError, pickle.PicklingError, AttributeError, TypeError) as error:  # pickle raises all of the last three
            log.warning("programs are traced here alone, which takes longer: %s", error)
        yield


class _TracingProcess:
    """One of them. Where it fails, the program is traced here."""

    def __init__(self, command: Sequence[str], order: bytes, tracers: Tracers) -> None:
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        own = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # the GPU is this process' alone
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, env=os.environ | own, stdin=pipe, stdout=pipe, stderr=nothing)
        self._is_over = False
        self._joining = Thread(target=self._join, args=(order, tracers), daemon=True)
        self._joining.start()

    def _join(self, order: bytes, tracers: Tracers) -> None:
        """Tells it what there is to trace and, when it is ready, puts it among the tracers."""
        reason = self._ask(order)
        if reason is None:
            tracers.put(self.trace)
        elif not self._is_over:
            log.warning("a tracing process cannot help: %s", reason)

    def trace(self, program: Program, platform: str) -> export.Exported:
        answer = self._ask(pickle.dumps(program.name))
        if isinstance(answer, bytearray):
            return export.deserialize(answer)
        log.warning("%s is traced here, since a tracing process failed: %s", program.name, answer)
        return trace_here(program, platform)

    def _ask(self, data: bytes) -> Any:
        """The answer; or, where it has ended, what says so."""
        assert self._process.stdin is not None and self._process.stdout is not None
        patience = Timer(PATIENCE_S, self._process.kill)
        patience.start()
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            return f"it has ended ({type(error).__name__})"
        finally:
            patience.cancel()

    def end(self) -> None:
        self._is_over = True
        self._process.kill()
        self._joining.join()
        with suppress(BrokenPipeError):  # what it has not read
            self._process.__exit__(None, None, None)
