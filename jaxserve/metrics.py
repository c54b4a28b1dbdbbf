"""What the engine reports about itself, as plain numbers. Who exports them is not known here (server/metrics.py does)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxserve.outputs import FinishReason


@dataclass(frozen=True, slots=True)
class StepStats:
    """One engine step, reported when its results have been collected.

    Attributes:
        kv_usage: share of the KV pool's pages that requests hold, 0 to 1.
        num_prompt_tokens, num_generation_tokens: computed in this step.
        prefix_queries, prefix_hits: prompt tokens looked up in, and found in, the prefix cache since the last report.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    num_prompt_tokens: int
    num_generation_tokens: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int


@dataclass(frozen=True, slots=True)
class TokenStats:
    """A new token of a request, or of several alike: seconds since its arrival (its first one) or since its previous one."""

    is_first: bool
    seconds: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class FinishedStats:
    """A request that ended; all times in seconds.

    Attributes:
        arrival_s, scheduled_s, first_token_s, last_token_s, ended_s: the engine's clock; None for what has not come to pass.
        chunk_ends_s: when each chunk of its prompt was computed.
    """

    request_id: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generation_tokens: int
    num_cached_tokens: int
    max_tokens: int | None
    n: int
    e2e_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
    num_preemptions: int
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float
    chunk_ends_s: tuple[float, ...]


class Observer(Protocol):
    """Receives the engine's reports, on the engine's thread: must be quick and never raise."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_tokens(self, stats: TokenStats) -> None: ...

    def on_finished(self, stats: FinishedStats) -> None: ...
