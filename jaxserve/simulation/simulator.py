"""Replays a trace through the engine with a runner that only keeps time. The same input gives the same report, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from jaxserve.buckets import Buckets, choose_buckets
from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.limits import Limits
from jaxserve.page_pool import PagePool
from jaxserve.prefix_cache import PrefixCache
from jaxserve.request import Request
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.simulation.cost import CostModel
from jaxserve.simulation.report import Recorder, Report
from jaxserve.simulation.trace import MAX_TOKEN_ID, TraceRequest
from jaxserve.step_plan import StepPlan
from jaxserve.step_results import StepResults
from jaxserve.step_runner import InFlight


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedRunner:
    """A StepRunner whose device does one step after the other, each for as long as the cost model says."""

    def __init__(self, cost: CostModel, buckets: Buckets, clock: Clock, on_dispatch: Callable[[], None]) -> None:
        self._cost = cost
        self._buckets = buckets
        self._clock = clock
        self._on_dispatch = on_dispatch
        self._busy_until = 0.0

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Starts a step as soon as the one before it is done."""
        shape = self._buckets.choose(plan.num_rows, plan.num_tokens, plan.num_samples, plan.num_page_updates)
        self._busy_until = max(self._busy_until, self._clock.now) + self._cost.step_s(plan, shape)
        self._on_dispatch()
        return InFlight(plan, plan.sample_rows(), {"done_s": self._busy_until})

    def is_ready(self, step: InFlight) -> bool:
        return bool(step.outputs["done_s"] <= self._clock.now)

    def collect(self, step: InFlight) -> StepResults:
        """Waits, which is to move the clock. Every token is 0."""
        self._clock.now = max(self._clock.now, step.outputs["done_s"])
        return {"tokens": np.zeros(len(step.plan.decodes) + len(step.rows), np.int32)}

    def set_shaping(self, request: Request) -> None:
        """No request of a trace has any."""

    def reset(self) -> None:
        """There is nothing to lose."""

    def shutdown(self) -> None:
        """There is nothing to free."""


def simulate(trace: Sequence[TraceRequest], cost: CostModel) -> Report:
    """Serves the trace's requests, each from its arrival on.

    Args:
        trace: in order of arrival.

    Raises:
        ConfigError: the cost model's engine cannot work, or a request is longer than its max_model_len.
    """
    clock, recorder = Clock(), Recorder()
    engine = _make_engine(cost, clock, recorder)
    started_s = clock.now = trace[0].timestamp / 1e3
    coming = list(enumerate(trace))[::-1]
    while coming or engine.has_work:
        if not engine.has_work:
            clock.now = max(clock.now, coming[-1][1].timestamp / 1e3)
        while coming and coming[-1][1].timestamp / 1e3 <= clock.now:
            _add(engine, *coming.pop(), clock)
        engine.step()
    return recorder.report(clock.now - started_s)


def _make_engine(cost: CostModel, clock: Clock, recorder: Recorder) -> Engine:
    sizes = cost.max_model_len, cost.page_size, cost.max_num_batched_tokens
    if (needed := sum(reach.max_pages(*sizes) for reach in cost.reaches)) > cost.num_pages:
        raise ConfigError(
            f"the pool has {cost.num_pages:,} pages, and a request of max_model_len ({cost.max_model_len:,} tokens) may need "
            f"{needed:,}; lower it, or raise num_pages"
        )
    config = EngineConfig.from_options(
        model=cost.name,
        max_model_len=cost.max_model_len,
        max_num_seqs=cost.max_num_seqs,
        max_num_batched_tokens=cost.max_num_batched_tokens,
        block_size=cost.page_size,
    ).resolve(cost.platform, cost.max_model_len)
    pages_per_slot = -(-cost.max_model_len // cost.page_size)
    batch = cost.max_num_seqs, cost.max_num_batched_tokens
    buckets = choose_buckets(cost.platform, *batch, pages_per_slot, cost.page_size, cost.reaches)
    pool = PagePool(cost.num_pages)
    limits = Limits(*batch, buckets.max_page_updates, token_sizes=buckets.tokens, align=buckets.align)
    cache = PrefixCache(pool, len(cost.windows)) if cost.enable_prefix_caching else None
    scheduler = Scheduler(limits, pool, cost.page_size, cache, cost.reaches)
    runner = SimulatedRunner(cost, buckets, clock, partial(recorder.on_dispatch, scheduler))
    return Engine(config, scheduler, runner, None, vocab_size=MAX_TOKEN_ID, observer=recorder, clock=clock)


def _add(engine: Engine, number: int, request: TraceRequest, clock: Clock) -> None:
    """Submits a request as of its arrival, which may be during the step that has just ended."""
    if request.input_length + request.output_length > engine.max_model_len:
        raise ConfigError(
            f"request {number} of the trace has {request.input_length:,} tokens and gets {request.output_length:,} more; "
            f"the cost model's max_model_len is {engine.max_model_len:,}"
        )
    params = SamplingParams(
        temperature=0.0, ignore_eos=True, max_tokens=request.output_length, detokenize=False, output_kind=OutputKind.FINAL_ONLY
    )
    now, clock.now = clock.now, request.timestamp / 1e3
    engine.add_request(request.prompt(number), params)
    clock.now = now
