"""The engine against a full-recompute oracle, over chunkings, page sizes, arrival orders and pool sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import InvalidRequestError, PromptTooLongError
from jaxserve.packing import Packer
from jaxserve.plan import PlanBuffer
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.tiny import VOCAB, assert_greedy, dense_logits, greedy, run, tiny_engine
from tests.tiny import random_prompts as prompts


@pytest.mark.parametrize("page_size, window", [(16, None), pytest.param(32, 24, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("recurrent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_of_nobodys_change_nothing(recurrent: bool) -> None:
    engine = tiny_engine(align=4, recurrent=recurrent)
    packer, nobodys = engine.runner._packer, []

    def pack(*args: Any) -> PlanBuffer:
        buffer = Packer.pack(packer, *args)
        nobodys.append(int((buffer.row_position < 0).sum()))
        return buffer

    packer.pack = pack
    work = prompts(2, [1, 5, 90, 17, 40, 100, 130, 64])
    ids = [engine.add_request(p, greedy(20)) for p in work]
    outputs = run(engine)
    assert {1, 2, 3} <= set(nobodys)
    for request_id, prompt in zip(ids, work, strict=True):
        assert_greedy(prompt, outputs[request_id].outputs[0].token_ids, recurrent=recurrent)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    out=st.lists(st.integers(1, 40), min_size=8, max_size=8),
    arrivals=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    num_pages=st.sampled_from([16, 64]),
    align=st.sampled_from([1, 4]),
)
def test_any_arrival_order_and_pool(
    seed: int, lengths: list[int], out: list[int], arrivals: list[int], num_pages: int, align: int
) -> None:
    """A pool of 16 pages holds one full request alone: most of these runs preempt."""
    engine = tiny_engine(num_pages=num_pages, align=align)
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


def test_requests_of_one_step_share_the_beginning_that_the_first_computes() -> None:
    engine = tiny_engine()
    prompt = prompts(5, [40])[0]
    work = [prompt + [i, i] for i in range(3)]
    ids = [engine.add_request(tokens, greedy(6)) for tokens in work]
    outputs = run(engine)
    assert [outputs[i].num_cached_tokens for i in ids] == [0, 32, 32]  # two whole pages of 16
    for request_id, tokens in zip(ids, work, strict=True):
        assert_greedy(tokens, outputs[request_id].outputs[0].token_ids)


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


def test_impossible_requests_are_refused() -> None:
    engine = tiny_engine()
    with pytest.raises(InvalidRequestError, match="no tokens"):
        engine.add_request([], greedy(1))
    with pytest.raises(InvalidRequestError, match=f"token id {VOCAB}"):
        engine.add_request([1, VOCAB], greedy(1))
    with pytest.raises(PromptTooLongError, match="256 tokens"):
        engine.add_request([1] * 256, greedy(1))
    assert not engine.has_work


def test_n_shares_the_prompt_and_copies_on_write() -> None:
    engine = tiny_engine(max_num_seqs=8)
    prompt = prompts(7, [40])[0]
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=24, output_kind=OutputKind.FINAL_ONLY)
    request_id = engine.add_request(prompt, params)
    most = 0
    outputs = {}
    while engine.has_work:
        outputs |= {o.request_id: o for o in engine.step()}
        engine.check_integrity()
        most = max(most, engine.scheduler.pool.num_held)
    together = [o.token_ids for o in outputs[request_id].outputs]
    assert [o.index for o in outputs[request_id].outputs] == [0, 1, 2, 3]
    assert len({tuple(t) for t in together}) == 4
    assert most == 2 + 4 * 2  # two full prompt pages shared; a copied third and one more for each of 64 tokens
    for index in range(4):  # the i-th sample is the request with seed + i, alone
        alone = engine.add_request(prompt, params.with_(n=1, seed=5 + index))
        assert run(engine)[alone].outputs[0].token_ids == together[index]


@pytest.mark.parametrize("num_pages, max_num_seqs", [(17, 8), (64, 3)])
def test_n_beyond_slots_or_pages_still_gives_all(num_pages: int, max_num_seqs: int) -> None:
    params = SamplingParams(n=5, seed=5, max_tokens=60, output_kind=OutputKind.FINAL_ONLY)
    prompt = prompts(8, [50])[0]
    roomy = tiny_engine(max_num_seqs=8)
    want = roomy.add_request(prompt, params)
    expected = [o.token_ids for o in run(roomy)[want].outputs]
    engine = tiny_engine(num_pages=num_pages, max_num_seqs=max_num_seqs)
    request_id = engine.add_request(prompt, params)
    assert [o.token_ids for o in run(engine)[request_id].outputs] == expected


def test_best_of_returns_the_likeliest() -> None:
    engine = tiny_engine(max_num_seqs=8)
    params = SamplingParams(n=6, seed=1, max_tokens=8, logprobs=0, output_kind=OutputKind.FINAL_ONLY)
    prompt = prompts(9, [20])[0]
    every = engine.add_request(prompt, params)
    completions = run(engine)[every].outputs
    best = engine.add_request(prompt, params.with_(n=2, best_of=6))
    ranked = sorted(completions, key=lambda o: -(o.cumulative_logprob or 0))[:2]
    assert [o.token_ids for o in run(engine)[best].outputs] == [o.token_ids for o in ranked]


def test_logprobs_of_prompt_and_output_are_the_oracles() -> None:
    engine = tiny_engine()
    prompt = prompts(10, [50])[0]
    cached = engine.add_request(prompt, greedy(1))
    run(engine)  # fills the prefix cache, which prompt_logprobs must not use
    request_id = engine.add_request(prompt, greedy(6, logprobs=3, prompt_logprobs=-1))
    neighbours = [engine.add_request(p, greedy(30)) for p in prompts(11, [90, 5, 33])]
    outputs = run(engine)
    output = outputs[request_id]
    assert output.num_cached_tokens == 0
    tokens = prompt + output.outputs[0].token_ids
    logits = dense_logits(tokens)
    want = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, entries in enumerate(output.prompt_logprobs[1:]):
        assert entries is not None
        got = np.array([entries[i].logprob for i in range(VOCAB)])
        np.testing.assert_allclose(got, want[position], atol=1e-4)
        assert entries[prompt[position + 1]].rank == 1 + (got > got[prompt[position + 1]]).sum()
    given = output.outputs[0].logprobs
    assert given is not None
    for offset, entries in enumerate(given):
        best = np.argsort(-want[len(prompt) - 1 + offset])[:3]
        assert set(entries) == set(best.tolist()) | {output.outputs[0].token_ids[offset]}
    assert all(outputs[n].outputs[0].finish_reason == "length" for n in neighbours)
    assert cached not in outputs


def test_min_tokens_and_allowed_ids() -> None:
    engine = tiny_engine()
    prompt = prompts(12, [12])[0]
    first = engine.add_request(prompt, greedy(10))
    tokens = run(engine)[first].outputs[0].token_ids
    held = engine.add_request(prompt, greedy(10, stop_token_ids=(tokens[0],), min_tokens=5))
    allowed = engine.add_request(prompt, greedy(10, allowed_token_ids=(3, 4)))
    outputs = run(engine)
    assert len(outputs[held].outputs[0].token_ids) >= 5
    assert tokens[0] not in outputs[held].outputs[0].token_ids[:5]
    assert set(outputs[allowed].outputs[0].token_ids) <= {3, 4}


def test_penalties_survive_preemption() -> None:
    """The same tokens from a pool that preempts and from one that does not; seeded sampling with penalties."""
    params = SamplingParams(
        seed=3, max_tokens=60, frequency_penalty=0.8, repetition_penalty=1.2, output_kind=OutputKind.FINAL_ONLY
    )
    work = prompts(13, [60, 70, 50, 80])
    results = []
    for num_pages in (64, 17):
        engine = tiny_engine(num_pages=num_pages)
        ids = [engine.add_request(p, params) for p in work]
        outputs = run(engine)
        results.append([outputs[i].outputs[0].token_ids for i in ids])
    assert results[0] == results[1]


def test_no_waiting_request_starves() -> None:
    """A long prompt behind which short ones keep arriving is admitted after a bounded number of them."""
    engine = tiny_engine(num_pages=17, max_num_seqs=4, prefix_caching=False)
    for p in prompts(14, [60, 60]):
        engine.add_request(p, greedy(60))
    engine.step()
    long = engine.add_request(prompts(15, [240])[0], greedy(4))
    rng = np.random.default_rng(0)
    for _ in range(1000):
        engine.add_request(rng.integers(0, VOCAB, 8).tolist(), greedy(2))
        if any(o.request_id == long for o in engine.step()):
            break
    else:
        pytest.fail("the long request starved")


def test_priority_goes_first() -> None:
    engine = tiny_engine(max_num_seqs=1, scheduling_policy="priority")
    order = [engine.add_request(p, greedy(2), priority=i) for i, p in zip([2, 1, 0], prompts(16, [9, 9, 9]), strict=True)]
    assert list(run(engine)) == order[::-1]


def test_priority_needs_its_policy() -> None:
    engine = tiny_engine()
    with pytest.raises(InvalidRequestError, match="requests run in order of arrival.*scheduling_policy"):
        engine.add_request([1], greedy(2), priority=-1)
    engine.add_request([1], greedy(2), priority=0)
    assert len(run(engine)) == 1
