"""Report: what a simulated run was like, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxserve.metrics import FinishedStats, StepStats, TokenStats
from jaxserve.scheduler import Scheduler

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Spread:
    """A quantity's mean and percentiles."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Report:
    """Times are simulated.

    Attributes:
        seconds: from the first arrival to the last token.
        ttft_ms: from a request's arrival to its first token.
        itl_ms: from one token of a request to its next.
        kv_use: share of the pool's pages that requests hold, of all steps.
        kv_waste: share of the tokens for which requests hold pages that are not there (yet), of all steps.
        prefix_hit_rate: share of the prompt tokens that came from the prefix cache.
    """

    num_requests: int
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Spread
    itl_ms: Spread
    e2e_ms: Spread
    kv_use: float
    kv_use_peak: float
    kv_waste: float
    prefix_hit_rate: float
    preemptions: int
    steps: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Recorder:
    """An Observer that makes the report."""

    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    num_between: list[int] = field(default_factory=list)
    finished: list[FinishedStats] = field(default_factory=list)
    kv_use: list[float] = field(default_factory=list)
    tokens_held: int = 0  # room in held pages, summed over steps
    tokens_wasted: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def on_step(self, stats: StepStats) -> None:
        self.preemptions += stats.num_preemptions
        self.prefix_queries += stats.prefix_queries
        self.prefix_hits += stats.prefix_hits

    def on_tokens(self, stats: TokenStats) -> None:
        if stats.is_first:
            self.first_s.append(stats.seconds)
        else:
            self.between_s.append(stats.seconds)
            self.num_between.append(stats.count)

    def on_finished(self, stats: FinishedStats) -> None:
        self.finished.append(stats)

    def on_dispatch(self, scheduler: Scheduler) -> None:
        """Notes what a step that has just been planned leaves in the pool."""
        page_size, pool = scheduler.page_size, scheduler.pool
        self.kv_use.append(pool.num_held / pool.num_pages)
        self.tokens_held += pool.num_held * page_size
        self.tokens_wasted += sum(scheduler.pages.num_empty(r.table, r.num_computed) for r in scheduler.running)

    def report(self, seconds: float) -> Report:
        num_output = sum(stats.num_generation_tokens for stats in self.finished)
        num_prompt = sum(stats.num_prompt_tokens for stats in self.finished)
        return Report(
            num_requests=len(self.finished),
            seconds=seconds,
            requests_per_s=len(self.finished) / seconds,
            output_tokens_per_s=num_output / seconds,
            total_tokens_per_s=(num_prompt + num_output) / seconds,
            ttft_ms=_spread(self.first_s, [1] * len(self.first_s)),
            itl_ms=_spread(self.between_s, self.num_between),
            e2e_ms=_spread([stats.e2e_s for stats in self.finished], [1] * len(self.finished)),
            kv_use=float(np.mean(self.kv_use)),
            kv_use_peak=max(self.kv_use),
            kv_waste=self.tokens_wasted / self.tokens_held,
            prefix_hit_rate=self.prefix_hits / max(self.prefix_queries, 1),
            preemptions=self.preemptions,
            steps=len(self.kv_use),
        )


def _spread(seconds: list[float], counts: list[int]) -> Spread:
    """In milliseconds; each value counts so many times. All 0 where there is none."""
    if not seconds:
        return Spread(0.0, 0.0, 0.0, 0.0)
    order = np.argsort(seconds)
    values, upto = np.array(seconds)[order] * 1e3, np.cumsum(np.array(counts)[order])
    at = [int(np.searchsorted(upto, p / 100 * upto[-1])) for p in PERCENTILES]
    return Spread(float(np.average(values, weights=np.array(counts)[order])), *(float(values[i]) for i in at))
