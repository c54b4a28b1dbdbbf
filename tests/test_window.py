"""Sliding windows: pages that no layer reads any more are free while their request runs, and nobody notices."""

from __future__ import annotations

import pytest

from jaxserve.engine import Engine
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.tiny import assert_greedy, greedy, random_prompts, run, tiny_engine

WINDOW, PAGE = 24, 16


def windowed(**options: int) -> Engine:
    return tiny_engine(**{"window": WINDOW, "all_windowed": True, "page_size": PAGE} | options)


@pytest.mark.slow
def test_a_long_request_holds_a_window() -> None:
    engine = windowed()
    prompt = random_prompts(1, [20])[0]
    request_id = engine.add_request(prompt, greedy(220))
    most, outputs = 0, {}
    while engine.has_work:
        outputs |= {o.request_id: o for o in engine.step()}
        engine.check_integrity()
        most = max(most, engine.scheduler.pool.num_held)
    assert_greedy(prompt, outputs[request_id].outputs[0].token_ids, WINDOW, all_windowed=True)
    assert most == -(-(WINDOW + PAGE - 1) // PAGE)  # those that a window may touch


@pytest.mark.slow
def test_requests_longer_than_the_pool_run_together() -> None:
    """Without preemption, though their 4 x 15 pages are three times what there is: others write to the pages that passed."""
    engine = windowed(num_pages=20)
    prompts = random_prompts(2, [30, 40, 20, 45])
    ids = [engine.add_request(p, greedy(190)) for p in prompts]
    outputs = run(engine)
    assert engine.scheduler.num_preemptions == 0
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert_greedy(prompt, outputs[request_id].outputs[0].token_ids, WINDOW, all_windowed=True)


def test_a_prompt_in_chunks_leaves_its_beginning() -> None:
    engine = windowed(max_num_batched_tokens=32)
    prompt = random_prompts(3, [200])[0]
    request_id = engine.add_request(prompt, greedy(10))
    held = []
    while not (outputs := engine.step()):
        held.append(engine.scheduler.pool.num_held)
        engine.check_integrity()
    assert held[0] == 2 and max(held) < 6
    assert_greedy(prompt, outputs[0].outputs[0].token_ids, WINDOW, all_windowed=True)
    assert outputs[0].request_id == request_id


@pytest.mark.slow
@pytest.mark.parametrize("num_pages", [64, 17])
def test_samples_prefix_hits_and_preemption(num_pages: int) -> None:
    """Pages that passed are others', or are found again; in the small pool requests are preempted, too."""
    params = SamplingParams(n=3, seed=1, max_tokens=90, output_kind=OutputKind.FINAL_ONLY)
    prompts = random_prompts(4, [70, 100, 60])
    want = []
    for prompt in prompts:
        engine = windowed(max_num_seqs=8)
        request_id = engine.add_request(prompt, params)
        want.append([o.token_ids for o in run(engine)[request_id].outputs])
    engine = windowed(num_pages=num_pages, max_num_seqs=8)
    for attempt in range(2):
        ids = [engine.add_request(prompt, params) for prompt in prompts]
        outputs = run(engine)
        assert [[o.token_ids for o in outputs[i].outputs] for i in ids] == want
        if attempt and num_pages == 64:
            assert all(outputs[i].num_cached_tokens for i in ids)
