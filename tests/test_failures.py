"""Failure inside: steps that raise, logits that are not finite, and an engine that gives up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve import LLM
from jaxserve.beam_search import BeamSearch
from jaxserve.engine import Engine
from jaxserve.errors import EngineDeadError
from jaxserve.failures import LATELY, STEPS, Failures
from jaxserve.intake import NO_TOKEN_ERROR
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.step_results import StepResults
from jaxserve.step_runner import InFlight
from tests.tiny import greedy, random_prompts, run, tiny_engine

FINAL = OutputKind.FINAL_ONLY
KINDS = [
    greedy(20),
    SamplingParams(seed=1, max_tokens=20, output_kind=FINAL),
    SamplingParams(seed=2, n=3, top_k=20, max_tokens=20, output_kind=FINAL),
    SamplingParams(seed=3, frequency_penalty=0.7, repetition_penalty=1.3, max_tokens=20, output_kind=FINAL),
    SamplingParams(seed=4, logprobs=2, prompt_logprobs=2, max_tokens=20, output_kind=FINAL),
    greedy(12, n=3, use_beam_search=True),
]


def tokens_of(engine: Engine, ids: list[str], outputs: dict[str, RequestOutput]) -> list[list[list[int]]]:
    assert all(outputs[i].error is None for i in ids)
    return [[completion.token_ids for completion in outputs[i].outputs] for i in ids]


def submit(engine: Engine) -> list[str]:
    return [engine.add_request(p, k) for p, k in zip(random_prompts(1, [30, 100, 45, 64, 20, 12]), KINDS, strict=True)]


def raise_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool = False) -> None:
    """The next call raises: instead of what it does, or once that is done."""
    original = getattr(owner, name)

    def fail(*args: Any) -> None:
        monkeypatch.setattr(owner, name, original)
        if after:
            original(*args)
        raise RuntimeError("injected")

    monkeypatch.setattr(owner, name, fail)


@pytest.fixture(scope="module")
def undisturbed() -> list[list[list[int]]]:
    engine = tiny_engine(max_num_seqs=8)
    ids = submit(engine)
    return tokens_of(engine, ids, run(engine))


@pytest.mark.parametrize(
    "where",
    [
        ("runner", "dispatch", False),
        ("runner", "dispatch", True),  # the state is donated and gone
        ("runner", "collect", False),
        ("scheduler", "schedule", True),
    ],
)
@pytest.mark.parametrize("steps", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 11])
def test_a_failed_step_changes_no_token(
    where: tuple[str, str, bool], steps: int, undisturbed: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever failed, and whatever was under way: prefill, forks, beams."""
    part, name, after = where
    engine = tiny_engine(max_num_seqs=8)
    ids = submit(engine)
    outputs = {}
    for _ in range(steps):
        outputs |= {o.request_id: o for o in engine.step() if o.finished}
    raise_once(monkeypatch, getattr(engine, part), name, after)
    outputs |= run(engine)
    assert tokens_of(engine, ids, outputs) == undisturbed


def test_failures_that_are_not_in_a_row(monkeypatch: pytest.MonkeyPatch, undisturbed: list[list[list[int]]]) -> None:
    engine = tiny_engine(max_num_seqs=8)
    ids = submit(engine)
    outputs = {}
    for _ in range(4):
        raise_once(monkeypatch, engine.runner, "collect")
        for _ in range(5):
            outputs |= {o.request_id: o for o in engine.step() if o.finished}
            engine.check_integrity()
    outputs |= run(engine)
    assert tokens_of(engine, ids, outputs) == undisturbed


def test_two_failures_in_a_row_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps can be sent and only their results never come, so that each second step does not fail."""
    engine = tiny_engine()
    engine.add_request([1, 2, 3], greedy(12))

    def fail(step: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "collect", fail)
    with pytest.raises(EngineDeadError, match="2 steps failed in a row; the last: injected") as first:
        run(engine, 20)
    assert isinstance(first.value.__cause__, RuntimeError)
    monkeypatch.undo()
    with pytest.raises(EngineDeadError) as second:
        engine.step()  # for good
    assert second.value is first.value
    assert [o.error for o in engine.fail_all("it has stopped")] == ["it has stopped"]
    assert not engine.scheduler.pool.num_held
    engine.check_integrity()


def test_a_failure_that_keeps_coming_back_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other step fails, so that a prompt of four chunks is never computed."""
    engine = tiny_engine()
    engine.add_request(list(range(90)) * 2, greedy(12))
    collect, count = engine.runner.collect, itertools.count(1)

    def fail_every_second(step: InFlight) -> StepResults:
        if next(count) % 2:
            return collect(step)
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "collect", fail_every_second)
    with pytest.raises(EngineDeadError, match=r"32 of the last 1,000 steps failed; the last: injected"):
        run(engine, 200)


def test_failures_that_are_rare_end_nothing() -> None:
    failures = Failures()
    for _ in range(3 * LATELY):
        assert failures.record_failure() is None
        for _ in range(STEPS // LATELY + 1):
            failures.record_success()


def test_a_state_that_cannot_be_made_again_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    request_id = engine.add_request([1, 2, 3], greedy(12))
    raise_once(monkeypatch, engine.runner, "dispatch")
    raise_once(monkeypatch, engine.runner, "reset")
    with pytest.raises(EngineDeadError, match="injected"):
        engine.step()
    engine.abort(request_id)


def test_llm_says_that_the_engine_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM.from_engine(tiny_engine())

    def fail(plan: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(llm.engine.runner, "dispatch", fail)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="injected"):
            llm.generate({"prompt_token_ids": [1, 2]}, greedy(3), use_tqdm=False)


def test_reset_frees_the_old_state_before_it_makes_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool fills the device: there is no room for two."""
    runner = tiny_engine().runner
    pool = runner._state.caches[0]
    programs = runner.programs

    def check() -> Any:
        assert pool.is_deleted()
        return programs.named("reset")()

    monkeypatch.setattr(runner, "programs", type(programs)({"reset": check}))
    runner.reset()
    assert not runner._state.caches[0].is_deleted()


@pytest.mark.parametrize("end", ["reset", "shutdown"])
def test_what_devices_lend_each_other_goes_with_the_state(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tiny_engine().runner
    fresh = runner.programs.named("reset")
    # A GPU's state has a table of this memory's addresses.
    monkeypatch.setattr(runner, "programs", type(runner.programs)({"reset": lambda: with_peers(fresh())}))
    runner.reset()
    lent = runner._lent
    assert lent and not any(array.is_deleted() for array in lent)
    getattr(runner, end)()
    assert all(array.is_deleted() for array in lent)
    assert len(runner._lent) == (len(lent) if end == "reset" else 0)


def with_peers(fresh: Any) -> Any:
    state, *others = fresh
    return replace(state, peers=jnp.zeros((1, 2, 2), jnp.int32)), *others


# Logits that are not finite

POISON = 95  # a token whose embedding is NaN


def poison(engine: Engine, token: int) -> None:
    engine.update_params(engine.params | {"embed": engine.params["embed"].at[token].set(jnp.nan)})


def poisoned(**options: Any) -> Engine:
    engine = tiny_engine(max_num_seqs=8, **options)
    poison(engine, POISON)
    return engine


def without_poison(prompts: list[list[int]]) -> list[list[int]]:
    return [[token % POISON for token in prompt] for prompt in prompts]


@pytest.mark.parametrize("params", KINDS, ids=["greedy", "seed", "n", "penalties", "logprobs", "beams"])
def test_only_the_broken_request_ends(params: SamplingParams) -> None:
    neighbours = without_poison(random_prompts(2, [20, 70, 33]))
    safe = greedy(15, logit_bias={POISON: -100.0})  # they must not sample it either
    engine = poisoned()
    alone = [engine.add_request(p, safe) for p in neighbours]
    want = run(engine)
    ids = [engine.add_request(p, safe) for p in neighbours[:2]]
    broken = engine.add_request([*neighbours[2], POISON, 5], params)
    ids.append(engine.add_request(neighbours[2], safe))
    outputs = run(engine)
    assert outputs[broken].error == NO_TOKEN_ERROR
    assert [o.finish_reason for o in outputs[broken].outputs] == ["error"] * len(outputs[broken].outputs)
    assert not any(o.token_ids for o in outputs[broken].outputs)
    for a, b in zip(alone, ids, strict=True):
        assert outputs[b].error is None
        assert outputs[b].outputs[0].token_ids == want[a].outputs[0].token_ids


@pytest.mark.parametrize("options", [{}, pytest.param({"platform": "gpu", "num_steps": 4}, marks=pytest.mark.slow)], ids=str)
def test_a_request_may_break_late(options: dict[str, Any]) -> None:
    """What it has until then is kept, also where it breaks in the middle of a program's steps."""
    engine = tiny_engine(**options)
    prompt = [token % 10 for token in random_prompts(3, [18])[0]]
    first = engine.add_request(prompt, greedy(20))
    tokens = run(engine)[first].outputs[0].token_ids
    index = next(i for i, token in enumerate(tokens) if i >= 5 and token not in prompt + tokens[:i])
    poison(engine, tokens[index])
    request_id = engine.add_request(prompt, greedy(20))
    output = run(engine)[request_id]
    assert output.error == NO_TOKEN_ERROR
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == (tokens[: index + 1], "error")


def test_nobody_finds_the_pages_of_a_broken_request() -> None:
    engine = poisoned()
    prompt = [*without_poison(random_prompts(4, [63]))[0], POISON, *range(30)]
    for _ in range(2):
        request_id = engine.add_request(prompt, greedy(4))
        output = run(engine)[request_id]
        assert output.error == NO_TOKEN_ERROR and output.num_cached_tokens == 0


def test_a_broken_prompt_ends_the_samples_that_wait_for_it() -> None:
    """Its log probabilities are not finite, chunks before its end."""
    engine = poisoned(max_num_batched_tokens=16)
    params = SamplingParams(n=4, prompt_logprobs=0, max_tokens=4, output_kind=FINAL)
    request_id = engine.add_request([POISON, *range(60)], params)
    output = run(engine)[request_id]
    assert [o.finish_reason for o in output.outputs] == ["error"] * 4


def test_best_of_prefers_what_did_not_break() -> None:
    engine = tiny_engine(max_num_seqs=8)
    prompt = [token % 10 for token in random_prompts(5, [20])[0]]
    params = SamplingParams(seed=1, n=6, logprobs=0, max_tokens=6, output_kind=FINAL)
    first = engine.add_request(prompt, params)
    every = sorted(run(engine)[first].outputs, key=lambda o: -(o.cumulative_logprob or 0.0))
    bad = next(token for token in every[0].token_ids[:-1] if token not in prompt)
    poison(engine, bad)
    request_id = engine.add_request(prompt, params.with_(n=1, best_of=6))
    want = next(o for o in every if bad not in o.token_ids[:-1])
    output = run(engine)[request_id]
    assert [o.token_ids for o in output.outputs] == [want.token_ids]


def test_bans_that_leave_no_token() -> None:
    engine = tiny_engine()
    params = greedy(8, allowed_token_ids=(3,), stop_token_ids=(3,), min_tokens=2)
    request_id = engine.add_request([1, 2], params)
    good = engine.add_request([1, 2], greedy(8, allowed_token_ids=(3,)))
    outputs = run(engine)
    assert outputs[request_id].error == NO_TOKEN_ERROR
    assert outputs[good].outputs[0].token_ids == [3] * 8


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_request_that_cannot_take_its_token_ends_alone(
    call: int, undisturbed: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beam search whose host code raises: it would raise again, however often its steps were repeated."""
    take, calls = BeamSearch.take, 0

    def fail(self: BeamSearch, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise ZeroDivisionError("injected")
        return take(self, *args)

    monkeypatch.setattr(BeamSearch, "take", fail)
    engine = tiny_engine(max_num_seqs=8)
    ids = submit(engine)
    outputs = run(engine)
    beams = next(i for i, kind in enumerate(KINDS) if kind.use_beam_search)
    assert "internal error" in (outputs[ids[beams]].error or "")
    assert tokens_of(engine, ids[:beams], outputs) == undisturbed[:beams]
