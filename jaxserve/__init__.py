"""jaxserve: serve large language models from JAX, on GPUs and TPUs.

Everything is imported on first use, so that `import jaxserve` stays quick and needs nothing that is not used.
"""

from __future__ import annotations

import importlib
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


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"jaxserve.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
