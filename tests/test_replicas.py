"""Replicas: where requests go, that one does not hold up another, and what is reported of all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from jaxserve.engine import Engine
from jaxserve.errors import EngineDeadError, InvalidRequestError
from jaxserve.metrics import StepStats
from jaxserve.outputs import RequestOutput
from jaxserve.replicas import Replicas, share
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.tiny import assert_greedy, greedy, tiny_engine


def replicas(count: int = 2) -> Replicas:
    return Replicas([tiny_engine() for _ in range(count)])


def run(engine: Replicas | Engine, limit: int = 2000) -> dict[str, RequestOutput]:
    finished = {}
    for _ in range(limit):
        if not engine.has_work:
            return finished
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    raise AssertionError(f"requests are unfinished after {limit} steps")


def where(engine: Replicas, ids: Sequence[str]) -> list[int]:
    return [engine._owners[request_id][0] for request_id in ids]


def test_each_request_goes_to_the_least_loaded() -> None:
    engine = replicas(3)
    ids = [engine.add_request([i, 5], greedy(4, n=n)) for i, n in enumerate([3, 1, 1, 1, 1, 1, 1])]
    assert where(engine, ids) == [0, 1, 2, 1, 2, 1, 2]
    engine.abort(ids[0])
    engine.abort(ids[0])
    assert where(engine, [engine.add_request([9], greedy(4))]) == [0]
    outputs = run(engine)
    assert len(outputs) == 7 and ids[0] not in outputs
    assert engine._loads == [0, 0, 0] and not engine._owners


def test_the_same_tokens_as_one_engine() -> None:
    """Greedy ones are the oracle's, sampled ones those of the same seeds."""
    alone, both = tiny_engine(), replicas()
    params = [greedy(8), SamplingParams(max_tokens=8, output_kind=OutputKind.FINAL_ONLY)] * 3
    results = []
    for engine in (alone, both):
        ids = [engine.add_request([i, 7, 2], p) for i, p in enumerate(params)]
        outputs = run(engine)
        results.append([outputs[request_id].outputs[0].token_ids for request_id in ids])
    assert results[0] == results[1]
    assert_greedy([0, 7, 2], results[0][0])


def test_an_id_in_use_is_refused_wherever_it_is() -> None:
    engine = replicas()
    for name in ("a", "b"):
        engine.add_request([1], greedy(4), request_id=name)
    for name in ("a", "b"):
        with pytest.raises(InvalidRequestError, match="in use"):
            engine.check(name, [1], greedy(4))
        with pytest.raises(InvalidRequestError, match="in use"):
            engine.add_request([1], greedy(4), request_id=name)
    assert engine._loads == [1, 1]
    with pytest.raises(InvalidRequestError, match="order of arrival"):
        engine.add_request([1], greedy(4), priority=1)


def test_a_slow_replica_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replicas()
    slow, fast = [engine.add_request([i], greedy(20)) for i in range(2)]
    monkeypatch.setattr(Engine, "is_ready", property(lambda self: self is engine.engines[1]))
    answered = []
    outputs: list[RequestOutput] = []
    while not outputs:
        outputs = engine.step()
        answered += engine.answered
    assert [output.request_id for output in outputs] == [fast] and answered == [fast]
    assert engine.engines[0]._before is not None and engine.engines[0]._in_flight is not None, "two steps are on their way"
    monkeypatch.undo()
    assert list(run(engine)) == [slow]


def test_a_replica_that_dies_is_the_end_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replicas()
    ids = [engine.add_request([i], greedy(20)) for i in range(4)]

    def fail(plan: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.engines[1].runner, "dispatch", fail)
    with pytest.raises(EngineDeadError, match="injected"):
        run(engine)
    outputs = engine.fail_all("gone")
    assert sorted(output.request_id for output in outputs) == sorted(ids)
    assert all(output.finished and output.error == "gone" for output in outputs)
    assert not engine._owners


def test_what_is_reported_is_of_all() -> None:
    class Seen:
        def __init__(self) -> None:
            self.steps: list[StepStats] = []
            self.others: list[object] = []

        def on_step(self, stats: StepStats) -> None:
            self.steps.append(stats)

        def on_tokens(self, stats: object) -> None:
            self.others.append(stats)

        on_finished = on_tokens

    seen = Seen()
    first, second = share(seen, 2)
    assert first is not None and second is not None

    def stats(running: int, usage: float, tokens: int) -> StepStats:
        return StepStats(running, running + 1, usage, tokens, tokens, 0, 0, 0)

    first.on_step(stats(3, 0.5, 10))
    second.on_step(stats(4, 0.1, 20))
    first.on_step(stats(1, 0.3, 30))
    assert [(s.num_running, s.num_waiting, s.kv_usage, s.num_prompt_tokens) for s in seen.steps] == [
        (3, 4, 0.25, 10),
        (7, 9, pytest.approx(0.3), 20),
        (5, 7, pytest.approx(0.2), 30),
    ]
    assert share(seen, 1) == [seen] and share(None, 2) == [None, None]


def test_priorities_hold_within_a_replica() -> None:
    engine = Replicas([tiny_engine(max_num_seqs=1, scheduling_policy="priority") for _ in range(2)])
    ids = [engine.add_request([i], greedy(2), priority=-i) for i in range(6)]
    order = list(run(engine))
    assert [i for i in order if i in ids[::2]] == ids[4::-2] and [i for i in order if i in ids[1::2]] == ids[5::-2]
