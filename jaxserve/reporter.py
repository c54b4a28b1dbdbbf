"""Reporter: tells the engine's Observer what happened. Reads the engine's books; only the counts since the last report are reset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from jaxserve.metrics import FinishedStats, Observer, StepStats, TokenStats
from jaxserve.outputs import FinishReason
from jaxserve.request import Request
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import StepPlan


class Reporter:
    """Turns requests and plans into plain numbers, if there is anybody to read them.

    Attributes:
        tokens_s: when the tokens that are being taken in came from the device.
    """

    def __init__(self, observer: Observer | None, clock: Callable[[], float]) -> None:
        self._observer = observer
        self._clock = clock
        self.tokens_s = 0.0

    def on_tokens(self, requests: Sequence[Request], now: float) -> None:
        """These requests have got a token. Most got their last ones together, so that one report serves them all."""
        if self._observer is None:
            return
        before = Counter([request.last_token_s for request in requests])
        for last_s, count in before.items():
            if last_s is not None:
                self._observer.on_tokens(TokenStats(is_first=False, seconds=now - last_s, count=count))
        for request in requests:
            if request.last_token_s is None:
                self._observer.on_tokens(TokenStats(is_first=True, seconds=now - request.group.arrival_s))
            request.last_token_s = now

    def on_step(self, plan: StepPlan, scheduler: Scheduler, num_sampled: int) -> None:
        """A step's results are taken in."""
        if self._observer is None:
            return
        cache, now = scheduler.prefix_cache, self._clock()
        num_prompt_tokens = 0
        for row in plan.rows:
            if row.start < row.request.num_prompt_tokens:
                num_prompt_tokens += row.num_tokens
                row.request.chunk_ends_s.append(now)
        stats = StepStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=scheduler.pool.num_held / scheduler.pool.num_pages,
            num_prompt_tokens=num_prompt_tokens,
            num_generation_tokens=num_sampled,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=cache.queries if cache is not None else 0,
            prefix_hits=cache.hits if cache is not None else 0,
        )
        scheduler.num_preemptions = 0
        if cache is not None:
            cache.queries = cache.hits = 0
        self._observer.on_step(stats)

    def on_finished(self, request: Request) -> None:
        """A request has ended, however it did."""
        if self._observer is None:
            return
        now, group = self._clock(), request.group
        scheduled = request.scheduled_s or now
        first = request.first_token_s or now
        reason: FinishReason = request.finish_reason or "abort"
        stats = FinishedStats(
            request_id=group.request_id,
            finish_reason=reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_generation_tokens=request.num_output_tokens,
            num_cached_tokens=request.num_cached_tokens,
            max_tokens=group.params.max_tokens,
            n=group.params.n,
            e2e_s=now - group.arrival_s,
            queue_s=scheduled - group.arrival_s,
            prefill_s=first - scheduled,
            decode_s=now - first,
            num_preemptions=request.num_preemptions,
            arrival_s=group.arrival_s,
            scheduled_s=request.scheduled_s,
            first_token_s=request.first_token_s,
            last_token_s=self.tokens_s if reason in ("stop", "length") else request.last_token_s,
            ended_s=now,
            chunk_ends_s=tuple(request.chunk_ends_s),
        )
        self._observer.on_finished(stats)
