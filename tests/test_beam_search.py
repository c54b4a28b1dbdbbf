"""Beam search against Hugging Face's, and against itself under small pools, few slots and busy neighbours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, BeamSearchParams
from jaxserve.engine import Engine
from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.step_results import likeliest
from tests.goldens.cases import write_checkpoint
from tests.tiny import VOCAB, dense_logits, greedy, run, tiny_engine

REFERENCE = json.loads((Path(__file__).parent / "data" / "beam_reference.json").read_text())
NEAR_TIE = 1e-3

Found = list[tuple[list[int], float]]
"""Output token ids and cumulative log probability of each sequence, best first."""


def beams(width: int, max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(n=width, use_beam_search=True, max_tokens=max_tokens, output_kind=OutputKind.FINAL_ONLY, **changes)


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def found(output: RequestOutput) -> Found:
    return [(o.token_ids, o.cumulative_logprob or 0.0) for o in output.outputs]


def assert_same(got: Found, want: Found) -> None:
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    np.testing.assert_allclose([p for _, p in got], [p for _, p in want], atol=1e-3)


def search_by_recompute(prompt: list[int], width: int, max_tokens: int, stop_ids: tuple[int, ...] = ()) -> Found:
    """The textbook's search with score = cumulative log probability, until no beam can get better; all logits anew each time."""
    live: Found = [([], 0.0)]
    ended: Found = []
    for step in range(max_tokens):
        following: Found = []
        for ids, total in live:
            logits = dense_logits(prompt + ids)[-1].astype(np.float64)
            logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            following += [([*ids, token], total + logprobs[token]) for token in range(VOCAB)]
        following.sort(key=lambda f: -f[1])
        is_last = step == max_tokens - 1
        ended += [f for f in following[:width] if is_last or f[0][-1] in stop_ids]
        ended = sorted(ended, key=lambda f: -f[1])[:width]
        live = [f for f in following if f[0][-1] not in stop_ids][:width]
        if len(ended) == width and live[0][1] <= ended[-1][1]:
            break
    return ended


# Against the references


def assert_as_reference(output: RequestOutput, case: dict[str, Any]) -> None:
    want = case["sequences"]
    assert len(output.outputs) == len(want)
    for i, (got, sequence) in enumerate(zip(output.outputs, want, strict=True)):
        assert got.cumulative_logprob is not None
        assert got.cumulative_logprob / len(got.token_ids) ** case["length_penalty"] == pytest.approx(sequence["score"], abs=1e-3)
        if i + 1 < len(want) and sequence["score"] - want[i + 1]["score"] < NEAR_TIE:
            return  # these two may change places
        assert got.token_ids == sequence["ids"]
        assert got.finish_reason == ("stop" if got.token_ids[-1] in case["stop_ids"] else "length")
        assert got.index == i


@pytest.mark.slow
@pytest.mark.usefixtures("quickest_compiles")
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.extra)])
def test_finds_what_transformers_finds(name: str, tmp_path: Path) -> None:
    """All of a checkpoint's cases at once, in fewer slots than they have beams."""
    cases = [case for case in REFERENCE if case["model"] == name]
    assert len(cases) >= 15
    folder = write_checkpoint(tmp_path / name, name)
    with LLM(str(folder), skip_tokenizer_init=True, dtype="float32", max_num_seqs=8, max_num_batched_tokens=64,
             max_model_len=64, num_gpu_blocks_override=64) as llm:  # fmt: skip
        ids = []
        for case in cases:
            params = beams(
                case["width"], case["max_tokens"], stop_token_ids=tuple(case["stop_ids"]), ignore_eos=True,
                length_penalty=case["length_penalty"], early_stopping=case["early_stopping"],
            )  # fmt: skip
            ids.append(llm.engine.add_request(case["prompt_ids"], params))
        outputs = run(llm.engine)
    for request_id, case in zip(ids, cases, strict=True):
        assert_as_reference(outputs[request_id], case)


@pytest.mark.extra
def test_smollm2_finds_what_transformers_finds(smollm2_path: Path) -> None:
    cases = [case for case in REFERENCE if case["model"] == "smollm2"]
    assert len(cases) >= 4
    with LLM(str(smollm2_path), dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128,
             num_gpu_blocks_override=64) as llm:  # fmt: skip
        for case in cases:
            params = BeamSearchParams(beam_width=case["width"], max_tokens=case["max_tokens"])
            (output,) = llm.beam_search({"prompt_token_ids": case["prompt_ids"]}, params, use_tqdm=False)
            assert len(output.sequences) == case["width"]
            for i, (sequence, want) in enumerate(zip(output.sequences, case["sequences"], strict=True)):
                assert sequence.score == pytest.approx(want["score"], abs=1e-3)
                if i + 1 < case["width"] and want["score"] - case["sequences"][i + 1]["score"] < NEAR_TIE:
                    break
                assert sequence.tokens == case["prompt_ids"] + want["ids"]
                assert llm.engine.tokenizer is not None
                assert sequence.text == llm.engine.tokenizer.decode(sequence.tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "stop_ids"), [(1, ()), (3, ()), (8, (20, 68)), (2, tuple(range(0, 40, 2))), (22, (7,))], ids=str
)
def test_equals_full_recompute(width: int, stop_ids: tuple[int, ...]) -> None:
    """The last two need more candidates than the sampler's short list holds, the last more slots than there are."""
    prompt = prompt_of(1, 37)
    engine = tiny_engine(max_num_seqs=8)
    request_id = engine.add_request(prompt, beams(width, 10, stop_token_ids=stop_ids, length_penalty=0.0))
    assert_same(found(run(engine)[request_id]), search_by_recompute(prompt, width, 10, stop_ids))


def test_one_beam_is_greedy() -> None:
    engine = tiny_engine()
    prompt = prompt_of(2, 30)
    search, sample = engine.add_request(prompt, beams(1, 20)), engine.add_request(prompt, greedy(20))
    outputs = run(engine)
    assert outputs[search].outputs[0].token_ids == outputs[sample].outputs[0].token_ids


# Pages and slots


def search_alone(prompt: list[int], params: SamplingParams) -> Found:
    engine = tiny_engine(max_num_seqs=8)
    request_id = engine.add_request(prompt, params)
    return found(run(engine)[request_id])


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("num_pages", "max_num_seqs"), [(16, 8), (17, 4), (20, 8), (64, 3), (64, 1)])
def test_small_pools_and_few_slots_change_nothing(num_pages: int, max_num_seqs: int, prefix_caching: bool) -> None:
    """A pool of 16 pages holds one full beam alone; with one slot every beam is computed again for each token."""
    prompt, params = prompt_of(3, 150), beams(4, 60 if max_num_seqs > 1 else 12)
    engine = tiny_engine(num_pages=num_pages, max_num_seqs=max_num_seqs, prefix_caching=prefix_caching)
    request_id = engine.add_request(prompt, params)
    got = found(run(engine)[request_id])
    assert_same(got, search_alone(prompt, params))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_neighbours_change_nothing(seed: int) -> None:
    """Searches and samples together in a pool that preempts, arriving one after another."""
    rng = np.random.default_rng(seed)
    engine = tiny_engine(num_pages=int(rng.choice([16, 18, 40])), max_num_seqs=int(rng.choice([3, 6, 8])))
    searches: dict[str, tuple[list[int], SamplingParams]] = {}
    finished: dict[str, RequestOutput] = {}
    for i in range(6):
        prompt = prompt_of(100 * seed + i, int(rng.integers(1, 150)))
        params = beams(int(rng.integers(2, 8)), int(rng.integers(1, 60)), stop_token_ids=(int(rng.integers(VOCAB)),))
        if i % 2:
            engine.add_request(prompt, greedy(int(rng.integers(1, 60))))
        else:
            searches[engine.add_request(prompt, params)] = prompt, params
        for _ in range(rng.integers(0, 20)):
            finished |= {o.request_id: o for o in engine.step()}
            engine.check_integrity()
    finished |= run(engine)
    assert len(finished) == 6
    for request_id, (prompt, params) in searches.items():
        assert_same(found(finished[request_id]), search_alone(prompt, params))


def steps(engine: Engine) -> Iterator[list[RequestOutput]]:
    while engine.has_work:
        yield engine.step()
        engine.check_integrity()


def test_beams_share_their_pages() -> None:
    """Six beams of a prompt of six full pages: those are held once, not six times."""
    engine = tiny_engine(max_num_seqs=8)
    engine.add_request(prompt_of(4, 96), beams(6, 40))
    held, without = [], []
    for _ in steps(engine):
        if len(engine.scheduler.running) == 6:
            held.append(engine.scheduler.pool.num_held)
            without.append(sum(len(list(r.table.held)) for r in engine.scheduler.running))
    assert len(held) > 30
    assert all(h <= w - 5 * 6 for h, w in zip(held, without, strict=True))
    assert max(without) == 6 * 9  # 136 tokens


def test_forks_reuse_the_tables_of_free_slots() -> None:
    """A fork's whole table would need a larger program in most steps; its slot's last table differs in few pages."""
    engine = tiny_engine(max_num_seqs=8)
    dispatch, updates = engine.runner.dispatch, []
    engine.runner.dispatch = lambda plan: updates.append(plan.num_page_updates) or dispatch(plan)  # type: ignore
    engine.add_request(prompt_of(5, 128), beams(4, 60))
    run(engine)
    assert max(updates[5:]) <= 8


def test_abort_frees_all_beams() -> None:
    engine = tiny_engine(max_num_seqs=8)
    request_id = engine.add_request(prompt_of(6, 50), beams(5, 40))
    for _ in range(9):
        engine.step()
    assert len(engine.scheduler.running) == 5
    engine.abort(request_id)
    engine.check_integrity()
    assert engine.scheduler.pool.num_held == 0
    assert run(engine) == {}


def test_engine_end_tells_the_user() -> None:
    engine = tiny_engine(max_num_seqs=8)
    request_id = engine.add_request(prompt_of(6, 50), beams(5, 40))
    for _ in range(9):
        engine.step()
    (output,) = engine.fail_all("the end")
    assert (output.request_id, output.finished, output.error) == (request_id, True, "the end")
    assert engine.scheduler.pool.num_held == 0


def test_a_failed_step_loses_no_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, params = prompt_of(7, 40), beams(4, 20)
    engine = tiny_engine(max_num_seqs=8)
    request_id = engine.add_request(prompt, params)
    for _ in range(11):
        engine.step()
    dispatch = engine.runner.dispatch

    def fail(plan: object) -> None:
        monkeypatch.setattr(engine.runner, "dispatch", dispatch)
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "dispatch", fail)
    assert_same(found(run(engine)[request_id]), search_alone(prompt, params))


# Parameters and outputs


def test_best_of_is_the_width() -> None:
    prompt = prompt_of(8, 20)
    wide = search_alone(prompt, beams(5, 15))
    assert_same(search_alone(prompt, beams(2, 15, best_of=5)), wide[:2])


def test_output_counts_and_cached_tokens() -> None:
    engine = tiny_engine(max_num_seqs=3)
    prompt = prompt_of(9, 64)
    engine.add_request(prompt, greedy(1))
    run(engine)
    request_id = engine.add_request(prompt, beams(4, 20))
    output = run(engine)[request_id]
    assert output.num_cached_tokens == 48  # the last token's page is computed again
    assert [len(o.token_ids) for o in output.outputs] == [20] * 4
    assert len({tuple(o.token_ids) for o in output.outputs}) == 4


def test_llm_beam_search() -> None:
    llm = LLM.from_engine(tiny_engine(max_num_seqs=8))
    prompts = [prompt_of(10, 20), prompt_of(11, 33)]
    params = BeamSearchParams(beam_width=3, max_tokens=12, length_penalty=2.0)
    outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        want = search_alone(prompt, beams(3, 12, length_penalty=2.0))
        assert_same([(s.tokens[len(prompt) :], s.cum_logprob) for s in output.sequences], want)
        for sequence in output.sequences:
            assert sequence.tokens[: len(prompt)] == prompt
            assert sequence.score == pytest.approx(sequence.cum_logprob / 12**2)
            assert (sequence.text, sequence.finish_reason, sequence.stop_reason) == ("", "length", None)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_k": 5}, "top_k"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"stop": "x"}, "stop"),
        ({"logprobs": 2}, "logprobs"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"best_of": 1}, "best_of"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
        ({"output_kind": OutputKind.DELTA}, "use_beam_search"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{"n": 2, "use_beam_search": True} | changes)
    assert caught.value.param == param


def test_bad_width_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="beam_width must be at least 1"):
        BeamSearchParams(beam_width=0, max_tokens=4)


@pytest.mark.parametrize("count", [0, 5, 20, 21, 60, VOCAB, VOCAB + 9, -1])
def test_likeliest(count: int) -> None:
    logprobs = np.random.default_rng(0).standard_normal((2, VOCAB)).astype(np.float32)
    order = np.argsort(-logprobs, kind="stable")
    top = np.take_along_axis(logprobs, order, 1)
    results = {"top_ids": order[:, :20], "top_logprobs": top[:, :20], "all_logprobs": logprobs}
    num = count if 0 <= count < VOCAB else VOCAB
    ids, values = likeliest(results, 1, count)
    assert ids.tolist() == order[1, :num].tolist()
    assert values.tolist() == top[1, :num].tolist()
