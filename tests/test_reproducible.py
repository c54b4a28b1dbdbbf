"""A request's tokens depend on nothing but itself: not on neighbours, chunks, preemption, prefix hits, slots or a restart."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jaxserve.engine import Engine
from jaxserve.outputs import CompletionOutput
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.tiny import greedy, random_prompts, run, tiny_engine

FINAL = OutputKind.FINAL_ONLY
PROMPT = random_prompts(1, [75])[0]
NEIGHBOURS = random_prompts(2, [5 + 13 * i % 90 for i in range(64)])
KINDS = {
    "greedy": greedy(40),
    "temperature": SamplingParams(seed=11, max_tokens=40, output_kind=FINAL),
    "top-k and top-p": SamplingParams(seed=12, temperature=1.3, top_k=30, top_p=0.9, max_tokens=40, output_kind=FINAL),
    "penalties": SamplingParams(seed=13, frequency_penalty=0.6, repetition_penalty=1.2, max_tokens=40, output_kind=FINAL),
    "n": SamplingParams(seed=14, n=3, max_tokens=40, output_kind=FINAL),
}
NEIGHBOUR_KINDS = [SamplingParams(seed=i, top_k=i % 7, max_tokens=1 + i % 30, output_kind=FINAL) for i in range(64)]

Tokens = list[list[int]]


def tokens_of(engine: Engine, params: SamplingParams, start: Callable[[Engine], None] = lambda engine: None) -> Tokens:
    """Of the request, submitted after what `start` does."""
    start(engine)
    request_id = engine.add_request(PROMPT, params)
    return [completion.token_ids for completion in run(engine)[request_id].outputs]


def among_neighbours(engine: Engine) -> None:
    """They run before, beside and after it, in other slots, and some have other samplers."""
    for prompt, params in zip(NEIGHBOURS[:32], NEIGHBOUR_KINDS, strict=False):
        engine.add_request(prompt, params)
    for _ in range(3):
        engine.step()
    for prompt, params in zip(NEIGHBOURS[32:], NEIGHBOUR_KINDS[32:], strict=True):
        engine.add_request(prompt, params)


@pytest.mark.slow
def test_among_64_neighbours_that_run_beside_it() -> None:
    """Every kind at once, and 65 requests in each step."""
    engine = tiny_engine(num_slots=72, num_pages=576, max_num_seqs=72, max_num_batched_tokens=144)
    alone = {name: tokens_of(engine, params) for name, params in KINDS.items()}
    assert alone == {name: tokens_of(tiny_engine(), params) for name, params in KINDS.items()}
    engine = tiny_engine(num_slots=72, num_pages=576, max_num_seqs=72, max_num_batched_tokens=144)
    for prompt in NEIGHBOURS:
        engine.add_request(prompt, SamplingParams(seed=1, max_tokens=100, output_kind=FINAL))
    ids = {name: engine.add_request(PROMPT, params) for name, params in KINDS.items()}
    outputs = run(engine)
    assert {name: [o.token_ids for o in outputs[ids[name]].outputs] for name in KINDS} == alone


def prefix_hit(engine: Engine) -> None:
    engine.add_request(PROMPT[:64], greedy(1))
    run(engine)


def aborted_before(engine: Engine) -> None:
    """Slots, pages and penalties of others are left behind."""
    ids = [engine.add_request(p, KINDS["penalties"]) for p in NEIGHBOURS[:6]]
    for _ in range(6):
        engine.step()
    for request_id in ids:
        engine.abort(request_id)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_else_happens(kind: str) -> None:
    params = KINDS[kind]
    want = tokens_of(tiny_engine(), params)
    assert len({tuple(tokens) for tokens in want}) == params.n
    got = {
        "a restart": tokens_of(tiny_engine(), params),
        "queued neighbours": tokens_of(tiny_engine(), params, among_neighbours),
        "chunks of 16": tokens_of(tiny_engine(max_num_batched_tokens=16), params),
        "chunks of 33": tokens_of(tiny_engine(max_num_batched_tokens=33), params, among_neighbours),
        "pages of 32": tokens_of(tiny_engine(page_size=32, num_pages=32), params),
        "a prefix hit": tokens_of(tiny_engine(), params, prefix_hit),
        "no prefix cache": tokens_of(tiny_engine(prefix_caching=False), params),
        "what others left": tokens_of(tiny_engine(), params, aborted_before),
        "another slot order": tokens_of(tiny_engine(max_num_seqs=8), params, among_neighbours),
    }
    assert got == dict.fromkeys(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_preempted(kind: str) -> None:
    """By requests that came before it, in a pool that is too small for all."""
    want = tokens_of(tiny_engine(), KINDS[kind])
    engine = tiny_engine(num_pages=17)

    def crowd(engine: Engine) -> None:
        for prompt in random_prompts(3, [60, 50]):
            engine.add_request(prompt, SamplingParams(seed=1, max_tokens=90, output_kind=FINAL))

    assert tokens_of(engine, KINDS[kind], crowd) == want
    assert engine.scheduler.num_preemptions


def test_requests_without_a_seed_repeat_after_a_restart() -> None:
    """The config's seed draws theirs, in order of arrival."""
    params = SamplingParams(max_tokens=20, output_kind=FINAL)

    def several(seed: int) -> list[Tokens]:
        engine = tiny_engine(seed=seed)
        ids = [engine.add_request(PROMPT[:20], params) for _ in range(3)]
        outputs = run(engine)
        return [[o.token_ids for o in outputs[i].outputs] for i in ids]

    first = several(0)
    assert several(0) == first and several(1) != first
    assert len({tuple(tokens[0]) for tokens in first}) == 3


def test_log_probabilities_are_bit_equal_within_a_program() -> None:
    """Other neighbours and other slots, but steps of the same size."""
    params = SamplingParams(seed=5, logprobs=3, max_tokens=30, output_kind=FINAL)

    def completion(neighbours: list[list[int]], position: int) -> CompletionOutput:
        engine = tiny_engine(max_num_seqs=8, prefix_caching=False)
        for prompt in neighbours[:position]:
            engine.add_request(prompt, SamplingParams(seed=6, max_tokens=60, output_kind=FINAL))
        request_id = engine.add_request(PROMPT[:10], params)
        for prompt in neighbours[position:]:
            engine.add_request(prompt, SamplingParams(seed=6, max_tokens=60, output_kind=FINAL))
        return run(engine)[request_id].outputs[0]

    want = completion(random_prompts(7, [9] * 5), 0)
    for seed, count, position in ((7, 5, 0), (8, 5, 3), (9, 3, 1), (10, 4, 4)):
        got = completion(random_prompts(seed, [9] * count), position)
        assert got.token_ids == want.token_ids
        assert got.logprobs == want.logprobs and got.cumulative_logprob == want.cumulative_logprob
