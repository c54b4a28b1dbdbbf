"""Recurrent states in the engine: whoever shares the steps, the pool and the slots, each request keeps its own state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.page_table import PageTable
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.slots import Slots
from jaxserve.startup import build_engine
from tests.goldens.cases import read_golden, write_checkpoint
from tests.tiny import VOCAB, assert_greedy, greedy, run, tiny_engine


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    out=st.lists(st.integers(1, 40), min_size=8, max_size=8),
    arrivals=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    num_pages=st.sampled_from([16, 64]),
)
def test_any_arrival_order_and_pool(seed: int, lengths: list[int], out: list[int], arrivals: list[int], num_pages: int) -> None:
    """Chunks of many prompts beside decodes, slots used again, and, with 16 pages, preemption."""
    engine = tiny_engine(num_pages=num_pages, recurrent=True)
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
        assert_greedy(prompt, tokens, recurrent=True)


@pytest.mark.slow
def test_a_preempted_request_gives_the_same_tokens() -> None:
    engine = tiny_engine(num_pages=17, recurrent=True)
    work = prompts(1, [60, 70, 50, 80])
    ids = [engine.add_request(p, greedy(60)) for p in work]
    outputs = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for request_id, prompt in zip(ids, work, strict=True):
        assert_greedy(prompt, outputs[request_id].outputs[0].token_ids, recurrent=True)


def test_a_slot_of_an_aborted_request_starts_anew() -> None:
    """One slot: each request follows another whose last step may still be under way."""
    engine = tiny_engine(max_num_seqs=1, recurrent=True)
    for i, prompt in enumerate(prompts(2, [30, 5, 90, 17])):
        aborted = engine.add_request(prompt, greedy(50))
        for _ in range(i + 1):
            engine.step()
        engine.abort(aborted)
        request_id = engine.add_request(prompt[::-1], greedy(6))
        assert_greedy(prompt[::-1], run(engine)[request_id].outputs[0].token_ids, recurrent=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_pages, max_num_seqs", [(64, 8), (17, 8), (64, 3)])
def test_forks_go_on_from_the_prompt_s_state(num_pages: int, max_num_seqs: int) -> None:
    engine = tiny_engine(num_pages=num_pages, max_num_seqs=max_num_seqs, recurrent=True)
    prompt = prompts(3, [40])[0]
    params = SamplingParams(n=5, temperature=1.0, seed=5, max_tokens=40, output_kind=OutputKind.FINAL_ONLY)
    neighbour = prompts(4, [50])[0]
    beside = engine.add_request(neighbour, greedy(30))
    request_id = engine.add_request(prompt, params)
    outputs = run(engine)
    together = [o.token_ids for o in outputs[request_id].outputs]
    assert len({tuple(t) for t in together}) == 5
    assert_greedy(neighbour, outputs[beside].outputs[0].token_ids, recurrent=True)
    for index in range(5):  # the i-th sample is the request with seed + i, alone
        alone = engine.add_request(prompt, params.with_(n=1, seed=5 + index))
        assert run(engine)[alone].outputs[0].token_ids == together[index]


@pytest.mark.parametrize("num_pages", [64, 17])
def test_beams_carry_their_states(num_pages: int) -> None:
    """The likeliest of four beams is at least as likely as the greedy text, by the same model's own account."""
    engine = tiny_engine(num_pages=num_pages, max_num_seqs=8, recurrent=True)
    prompt = prompts(5, [30])[0]
    searched = engine.add_request(prompt, SamplingParams(n=4, use_beam_search=True, temperature=0.0, max_tokens=20))
    found = run(engine)[searched].outputs
    for beam in found:
        scored = engine.add_request(prompt + beam.token_ids, greedy(1, prompt_logprobs=0))
        entries = run(engine)[scored].prompt_logprobs
        assert entries is not None
        total = sum(
            entry[token].logprob  # type: ignore[index]
            for entry, token in zip(entries[len(prompt) :], beam.token_ids, strict=True)
        )
        np.testing.assert_allclose(beam.cumulative_logprob, total, atol=1e-3)
    assert len({tuple(beam.token_ids) for beam in found}) == 4


def test_a_failed_step_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(recurrent=True)
    prompt = prompts(6, [40])[0]
    request_id = engine.add_request(prompt, greedy(12))
    for _ in range(3):
        engine.step()
    dispatch = engine.runner.dispatch

    def fail(plan: object) -> None:
        monkeypatch.setattr(engine.runner, "dispatch", dispatch)
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "dispatch", fail)
    assert_greedy(prompt, run(engine)[request_id].outputs[0].token_ids, recurrent=True)


@pytest.mark.slow
def test_a_model_of_states_alone(tmp_path: Path) -> None:
    """No layer has pages, so they bind nobody: as many requests as slots, each as long as the model allows."""
    folder = write_checkpoint(tmp_path / "rwkv", "rwkv")
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "skip_tokenizer_init": True}
    engine = build_engine(EngineConfig.from_options(model=str(folder), **options))
    assert isinstance(engine, Engine)
    assert "off" in engine.description["prefix cache"] and engine.scheduler.prefix_cache is None
    assert engine.max_model_len == 1 << 20
    tokens, logits = read_golden("rwkv")
    ids = [engine.add_request(row.tolist(), greedy(3, prompt_logprobs=-1)) for row in (*tokens, tokens[0])]
    outputs = run(engine)
    for request_id, wanted in zip(ids, (*logits, logits[0]), strict=True):
        wanted = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
        got = outputs[request_id].prompt_logprobs
        assert got is not None
        got = np.array([[entry[i].logprob for i in range(wanted.shape[1])] for entry in got[1:] if entry])
        assert np.abs(got - wanted[:-1]).max() < 0.01 * wanted.std()


def test_copies_of_copies_and_of_slots_given_back() -> None:
    slots = Slots(8)
    slots.fork(0, 1)
    slots.fork(1, 2)  # slot 1 holds nothing yet
    slots.fork(0, 3)
    slots.give_back(3, PageTable())
    forks = slots.take_forks()
    assert sorted(forks) == [(0, 1), (0, 2)]
    slots.fork(4, 1)
    slots.put_back_forks(forks)
    assert sorted(slots.take_forks()) == [(0, 2), (4, 1)]
    assert slots.take_forks() == []
