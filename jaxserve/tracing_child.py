"""The process that traces programs for another one (tracing_processes.py): reads an Order and names, answers with traces."""

from __future__ import annotations

import gc
import os
import pickle
from contextlib import suppress
from typing import BinaryIO

import jax

from jaxserve.absent_gpu import absent_gpus
from jaxserve.compiling import on_target
from jaxserve.programs import declare_programs
from jaxserve.sharding import make_mesh
from jaxserve.trace_cache import source_digest, trace_here
from jaxserve.tracing_processes import Order

_OWN_SETTINGS = ("jax_platform", "jax_cuda", "jax_compilation_cache", "jax_persistent", "jax_enable_compilation_cache")


def main() -> None:
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be among the answers
    gc.disable()  # collecting takes a tenth of the time, and the process does not get old
    answer_all(orders, answers)


def answer_all(orders: BinaryIO, answers: BinaryIO) -> None:
    """Until there are no more orders. An answer is None (ready), a trace's bytes, or a text that says what went wrong."""
    tracer = _Tracer()
    with suppress(EOFError):
        while True:
            answer = tracer.answer(pickle.load(orders))
            pickle.dump(answer, answers)
            answers.flush()


class _Tracer:
    """Traces what the first order has declared."""

    def answer(self, asked: Order | str) -> bytearray | str | None:
        try:
            if isinstance(asked, str):
                return self._trace(asked)
            self._begin(asked)
            return None
        except Exception as error:  # noqa: BLE001  whatever it is, the process that asks can do without
            return f"{type(error).__name__}: {error}"

    def _begin(self, order: Order) -> None:
        if order.source != source_digest():
            raise RuntimeError("the source code has changed since the process that asks was started")
        for name, value in order.settings.items():
            if jax.config.values.get(name) != value and not name.startswith(_OWN_SETTINGS):
                jax.config.update(name, value)
        is_gpu = order.build.runtime.platform == "gpu"
        devices = absent_gpus("h100", order.num_devices) if is_gpu else jax.devices()
        build = order.build.on_mesh(make_mesh(order.num_devices, devices))
        self._runtime = build.runtime
        self._programs = {p.name: p for p in declare_programs(build.inputs(), build.model.apply, build.runtime)}

    def _trace(self, name: str) -> bytearray:
        with on_target(self._runtime):
            return trace_here(self._programs[name], self._runtime.platform).serialize()
