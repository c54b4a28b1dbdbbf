"""Replicas: several engines behind one engine's interface, each with its own copy of the model on its own devices.

One thread drives them all: a step's work on the device goes on while the others are planned and their results taken in.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.metrics import FinishedStats, Observer, StepStats, TokenStats
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

POLL_S = 1e-4  # how often to look for results while every replica computes


class Replicas:
    """A request goes to the replica with the fewest samples to compute, and stays there."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Takes over engines of one config, whose devices are disjoint."""
        self.engines = list(engines)
        self._owners: dict[str, tuple[int, int]] = {}  # request -> its engine's number, its samples
        self._loads = [0] * len(engines)
        self._names = itertools.count()
        self._seeds = np.random.default_rng(self.config.model.seed)

    @property
    def config(self) -> EngineConfig:
        return self.engines[0].config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engines[0].tokenizer

    @property
    def vocab_size(self) -> int:
        return self.engines[0].vocab_size

    @property
    def max_model_len(self) -> int:
        return self.engines[0].max_model_len

    @property
    def default_sampling(self) -> dict[str, Any]:
        return self.engines[0].default_sampling

    @property
    def description(self) -> dict[str, str]:
        return self.engines[0].description | {"replicas": f"{len(self.engines)}, each as above"}

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    @property
    def answered(self) -> list[str]:
        """See Engine."""
        return [request_id for engine in self.engines for request_id in engine.answered]

    def check(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int = 0) -> None:
        """See Engine."""
        owner, _ = self._owners.get(request_id, (0, 0))
        self.engines[owner].check(request_id, prompt_token_ids, params, priority)

    def add_request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None, **options: Any
    ) -> str:
        """See Engine."""
        request_id = f"request-{next(self._names)}" if request_id is None else request_id
        if params.seed is None:  # drawn here, so that it does not depend on the replica
            params = params.with_(seed=int(self._seeds.integers(2**63)))
        least_loaded = min(range(len(self.engines)), key=self._loads.__getitem__)
        owner, _ = self._owners.get(request_id, (least_loaded, 0))  # the engine itself refuses an id that it has
        self.engines[owner].add_request(prompt_token_ids, params, request_id=request_id, **options)
        self._owners[request_id] = owner, params.num_samples
        self._loads[owner] += params.num_samples
        return request_id

    def abort(self, request_id: str) -> None:
        """See Engine."""
        if request_id in self._owners:
            self.engines[self._owners[request_id][0]].abort(request_id)
            self._forget(request_id)

    def step(self) -> list[RequestOutput]:
        """Keeps every replica at work, and takes in the results that are there; waits until one has some."""
        working = [engine for engine in self.engines if engine.has_work]
        for engine in working:
            engine.dispatch()
        while not (ready := [engine for engine in working if engine.is_ready]) and working:
            time.sleep(POLL_S)
        for engine in self.engines:
            engine.answered.clear()
        return self._ended([output for engine in ready for output in engine.collect()])

    @property
    def params(self) -> dict[str, jax.Array]:
        """See Engine; those of the first replica."""
        return self.engines[0].params

    def update_params(self, tree: Any) -> int:
        """See Engine; every replica gets the arrays on its own devices."""
        placed = [engine.weights.place(tree) for engine in self.engines]  # all, before anything changes
        versions = [engine.use_weights(weights) for engine, weights in zip(self.engines, placed, strict=True)]
        return versions[0]

    def fail_all(self, error: str) -> list[RequestOutput]:
        """See Engine."""
        return self._ended([output for engine in self.engines for output in engine.fail_all(error)])

    def shutdown(self) -> None:
        """See Engine."""
        for engine in self.engines:
            engine.shutdown()

    def check_integrity(self) -> None:
        """See Engine."""
        for engine in self.engines:
            engine.check_integrity()

    def _ended(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        for output in outputs:
            if output.finished:
                self._forget(output.request_id)
        return outputs

    def _forget(self, request_id: str) -> None:
        owner, num_samples = self._owners.pop(request_id)
        self._loads[owner] -= num_samples


class SharedObserver:
    """Makes one Observer of several replicas: what is so now is of all of them, what has happened of the one."""

    def __init__(self, observer: Observer, latest: list[StepStats | None], index: int) -> None:
        self._observer = observer
        self._latest = latest  # shared by the replicas
        self._index = index

    def on_step(self, stats: StepStats) -> None:
        self._latest[self._index] = stats
        known = [s for s in self._latest if s is not None]
        total = replace(
            stats,
            num_running=sum(s.num_running for s in known),
            num_waiting=sum(s.num_waiting for s in known),
            kv_usage=sum(s.kv_usage for s in known) / len(self._latest),
        )
        self._observer.on_step(total)

    def on_tokens(self, stats: TokenStats) -> None:
        self._observer.on_tokens(stats)

    def on_finished(self, stats: FinishedStats) -> None:
        self._observer.on_finished(stats)


def share(observer: Observer | None, count: int) -> list[Observer | None]:
    """An observer for each of so many replicas."""
    if observer is None or count == 1:
        return [observer] * count
    latest: list[StepStats | None] = [None] * count
    return [SharedObserver(observer, latest, index) for index in range(count)]
