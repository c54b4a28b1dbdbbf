"""The engine under random use: adds, aborts, forks, beams, preemptions, weight swaps, failures; the books balance throughout."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.engine import Engine
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.tiny import VOCAB, assert_greedy, check_integrity, greedy, run, tiny_engine

SHARED = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()  # prompts begin alike, so that pages are shared

PARAMS = st.one_of(
    st.builds(greedy, st.integers(1, 40)),
    st.builds(greedy, st.integers(1, 10), prompt_logprobs=st.just(1)),
    st.builds(
        SamplingParams,
        n=st.integers(1, 5),
        seed=st.integers(0, 5),
        max_tokens=st.integers(1, 40),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        stop_token_ids=st.sampled_from([(), tuple(range(8))]),
        output_kind=st.sampled_from(OutputKind),
    ),
    st.builds(greedy, st.integers(1, 12), n=st.integers(2, 4), use_beam_search=st.just(True)),
)
PROMPTS = st.builds(
    lambda shared, own: SHARED[:shared] + own, st.integers(0, 100), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60)
)
ACTIONS = st.one_of(
    st.tuples(st.just("add"), PROMPTS, PARAMS, st.integers(-1, 1)),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("swap"), st.integers(0, 1)),
    st.tuples(st.just("fail"), st.sampled_from(["dispatch", "collect"])),
)


class User:
    """Keeps the books of what it has asked for and what it was given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asked: dict[str, tuple[list[int], SamplingParams]] = {}
        self.aborted: set[str] = set()
        self.ended: Counter[str] = Counter()
        self.outputs: dict[str, RequestOutput] = {}
        self.num_given: Counter[tuple[str, int]] = Counter()  # tokens of DELTA outputs
        self.swaps = 0
        first = engine.params
        self.versions = first, {name: jax.device_put(np.asarray(x) * np.float32(1.1), x.sharding) for name, x in first.items()}

    def add(self, prompt: list[int], params: SamplingParams, priority: int) -> None:
        self.asked[self.engine.add_request(prompt, params, priority=priority)] = prompt, params

    def abort(self, which: int) -> None:
        live = [i for i in self.asked if not self.ended[i] and i not in self.aborted]
        if live:
            self.engine.abort(live[which % len(live)])
            self.aborted.add(live[which % len(live)])

    def swap(self, which: int) -> None:
        assert self.engine.update_params(self.versions[which]) == self.swaps + 1
        self.swaps += 1

    def fail(self, name: str) -> None:
        """The next call of the runner's method raises; the one after a failure must not, or the engine gives up."""
        original = getattr(self.engine.runner, name)

        def once(*args: Any) -> None:
            setattr(self.engine.runner, name, original)
            raise RuntimeError("injected")

        if not self.engine._failures.in_a_row:
            setattr(self.engine.runner, name, once)
            self.step(3)
            setattr(self.engine.runner, name, original)
        while self.engine._failures.in_a_row and self.engine.has_work:
            self.step(1)

    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                self._look_at(output)
            check_integrity(self.engine)

    def _look_at(self, output: RequestOutput) -> None:
        request_id = output.request_id
        assert not self.ended[request_id] and request_id not in self.aborted, "an output after the end"
        assert 0 <= output.first_weight_version <= output.weight_version <= self.swaps
        self.ended[request_id] += output.finished
        self.outputs[request_id] = output
        if self.asked[request_id][1].output_kind is OutputKind.DELTA:
            for completion in output.outputs:
                self.num_given[request_id, completion.index] += len(completion.token_ids)

    def check(self, **model: Any) -> None:
        """After the last step; model is what the oracle takes."""
        assert +self.ended == Counter(self.asked.keys() - self.aborted)
        for request_id, output in self.outputs.items():
            if request_id not in self.aborted:
                self._check(request_id, output, model)

    def _check(self, request_id: str, output: RequestOutput, model: dict[str, Any]) -> None:
        prompt, params = self.asked[request_id]
        assert output.error is None
        is_delta = params.output_kind is OutputKind.DELTA
        if not is_delta:
            assert [c.index for c in output.outputs] == list(range(params.n))
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length")
            given = self.num_given[request_id, completion.index] if is_delta else len(completion.token_ids)
            assert given == params.max_tokens if completion.finish_reason == "length" else 1 <= given <= (params.max_tokens or 0)
        if params.is_greedy and not params.use_beam_search and not self.swaps:
            assert_greedy(prompt, output.outputs[0].token_ids, **model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"window": 24, "page_size": 32, "num_pages": 12}, marks=pytest.mark.extra),
        {"window": 24, "hybrid": True, "num_pages": 40},
        {"window": 24, "all_windowed": True},
        {"recurrent": True},
        {"platform": "gpu", "num_steps": 4, "window": 24, "hybrid": True, "num_pages": 40},
    ],
    ids=str,
)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=st.lists(ACTIONS, min_size=3, max_size=30),
    num_pages=st.sampled_from([17, 40]),
    rows=st.sampled_from([2, 8]),
    align=st.sampled_from([1, 4]),
)
def test_every_request_ends_exactly_once(
    options: dict[str, Any], actions: list[Any], num_pages: int, rows: int, align: int
) -> None:
    """A pool of 17 pages (more, where given) holds one request of the greatest length: most of these runs preempt."""
    engine = tiny_engine(
        **{"num_pages": num_pages, "max_num_seqs": rows, "align": align, "scheduling_policy": "priority"} | options
    )
    user = User(engine)
    for name, *args in actions:
        getattr(user, name)(*args)
    while engine.has_work:
        user.step(1)
    assert not engine.scheduler.pool.num_held and not run(engine)
    user.check(**{name: value for name, value in options.items() if name in ("window", "all_windowed", "recurrent", "hybrid")})
