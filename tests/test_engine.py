"""The engine against a full-recompute oracle, over chunkings, page sizes, arrival orders and pool sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import InvalidRequestError, PromptTooLongError
from tests.tiny import VOCAB, assert_greedy, greedy, run, tiny_engine


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


@pytest.mark.parametrize("page_size, window", [(16, None), (32, 24)])
def test_equals_full_recompute(page_size: int, window: int | None) -> None:
    engine = tiny_engine(page_size=page_size, window=window)
    work = prompts(1, [1, 5, 16, 17, 40, 100, 130, 64])
    ids = [engine.add_request(p, greedy(20)) for p in work]
    outputs = run(engine)
    for request_id, prompt in zip(ids, work, strict=True):
        tokens = outputs[request_id].outputs[0].token_ids
        assert len(tokens) == 20
        assert outputs[request_id].outputs[0].finish_reason == "length"
        assert_greedy(prompt, tokens, window)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    out=st.lists(st.integers(1, 40), min_size=8, max_size=8),
    arrivals=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    num_pages=st.sampled_from([16, 64]),
)
def test_any_arrival_order_and_pool(
    seed: int, lengths: list[int], out: list[int], arrivals: list[int], num_pages: int
) -> None:
    """A pool of 16 pages holds one full request alone: most of these runs preempt."""
    engine = tiny_engine(num_pages=num_pages)
    work = prompts(seed, lengths)
    outputs, ids = {}, {}
    for i, prompt in enumerate(work):
        ids[i] = engine.add_request(prompt, greedy(out[i]))
        for _ in range(arrivals[i]):
            outputs |= {o.request_id: o for o in engine.step()}
            engine.check_integrity()
    outputs |= run(engine)
    for i, prompt in enumerate(work):
        tokens = outputs[ids[i]].outputs[0].token_ids
        assert len(tokens) == out[i]
        assert_greedy(prompt, tokens)


def test_prefix_hit_computes_only_the_rest() -> None:
    engine = tiny_engine()
    prompt = prompts(3, [100])[0]
    first = engine.add_request(prompt, greedy(8))
    a = run(engine)[first]
    second = engine.add_request(prompt[:90] + [1, 2, 3], greedy(8))
    third = engine.add_request(prompt, greedy(8), cache_salt="other")
    outputs = run(engine)
    assert a.num_cached_tokens == 0
    assert outputs[second].num_cached_tokens == 80  # five whole pages of 16
    assert outputs[third].num_cached_tokens == 0
    assert outputs[third].outputs[0].token_ids == a.outputs[0].token_ids
    assert_greedy(prompt[:90] + [1, 2, 3], outputs[second].outputs[0].token_ids)


def test_stop_ids_end_a_request_and_free_everything() -> None:
    engine = tiny_engine()
    prompt = prompts(4, [10])[0]
    request_id = engine.add_request(prompt, greedy(30))
    tokens = run(engine)[request_id].outputs[0].token_ids
    stop = tokens[5]
    request_id = engine.add_request(prompt, greedy(30, stop_token_ids=(stop,)))
    output = run(engine)[request_id].outputs[0]
    assert output.token_ids == tokens[: tokens.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_abort_frees_pages_at_once() -> None:
    engine = tiny_engine()
    ids = [engine.add_request(p, greedy(50)) for p in prompts(5, [30, 40, 50, 60, 70])]
    for _ in range(4):
        engine.step()
    for request_id in ids:
        engine.abort(request_id)
    engine.abort("unknown")
    assert engine.scheduler.pool.num_held == 0
    engine.check_integrity()
    assert run(engine) == {}


def test_a_failed_step_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    prompt = prompts(6, [40])[0]
    request_id = engine.add_request(prompt, greedy(12))
    for _ in range(3):
        engine.step()
    dispatch = engine.runner.dispatch

    def fail(plan: object) -> None:
        monkeypatch.setattr(engine.runner, "dispatch", dispatch)
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "dispatch", fail)
    assert_greedy(prompt, run(engine)[request_id].outputs[0].token_ids)


def test_impossible_requests_are_refused() -> None:
    engine = tiny_engine()
    with pytest.raises(InvalidRequestError, match="no tokens"):
        engine.add_request([], greedy(1))
    with pytest.raises(InvalidRequestError, match=f"token id {VOCAB}"):
        engine.add_request([1, VOCAB], greedy(1))
    with pytest.raises(PromptTooLongError, match="256 tokens"):
        engine.add_request([1] * 256, greedy(1))
    assert not engine.has_work
