"""jaxserve: serve large language models from JAX, on GPUs and TPUs.

Everything is imported on first use, so that `import jaxserve` stays quick and needs nothing that is not used.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine
    from jaxserve.beam_search import BeamSearchOutput, BeamSearchParams
    from jaxserve.config import EngineConfig
    from jaxserve.llm import LLM
    from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxserve.sampling_params import OutputKind, SamplingParams

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "OutputKind": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "EngineConfig": "config",
    "AsyncEngine": "async_engine",
    "BeamSearchParams": "beam_search",
    "BeamSearchOutput": "beam_search",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "OutputKind",
    "RequestOutput",
    "SamplingParams",
]


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: they take a fifth longer with garbage collection, though all that they make stays."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        with uncollected():
            return getattr(importlib.import_module(f"jaxserve.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
