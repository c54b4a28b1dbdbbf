"""Groups of layers that read differently far back: each has pages of its own from the one pool, and nobody notices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM
from jaxserve.build import Build
from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.models.cache_layout import Reach
from jaxserve.models.loading import open_source
from jaxserve.outputs import RequestOutput
from jaxserve.page_keys import page_keys, root_key
from jaxserve.pool_size import longest_request, tokens_held
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.sharding import make_mesh
from jaxserve.startup import plan_build
from tests.goldens.cases import read_golden, write_checkpoint
from tests.models.forward import forward, open_and_load
from tests.tiny import assert_greedy, check_integrity, greedy, random_prompts, run, tiny_engine

WINDOW, PAGE = 24, 16
WINDOWED = [0, 1, 3]  # columns of a table: windows (of two layers, and of one), everything, chunks of 40


def hybrid(**options: int) -> Engine:
    return tiny_engine(**{"window": WINDOW, "hybrid": True, "page_size": PAGE, "num_pages": 200} | options)


def assert_oracle(prompts: Sequence[list[int]], outputs: Sequence[RequestOutput]) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(prompt, output.outputs[0].token_ids, WINDOW, hybrid=True)


def held_after_steps(engine: Engine) -> tuple[np.ndarray, list[RequestOutput]]:
    """[steps, columns]: the pages of the only request, while it runs."""
    held, outputs = [], []
    while engine.has_work:
        outputs += engine.step()
        check_integrity(engine)
        held += [[len(column.held) for column in request.table.columns] for request in engine.scheduler.running]
    return np.array(held), outputs


@pytest.mark.slow
def test_each_group_holds_what_it_reads() -> None:
    engine, prompt = hybrid(), random_prompts(1, [20])[0]
    engine.add_request(prompt, greedy(220))
    held, outputs = held_after_steps(engine)
    assert_oracle([prompt], outputs)
    assert held.max(axis=0).tolist() == [3, 3, 15, 3]
    assert held[60:].min(axis=0).tolist()[3] == 1, "a chunk that begins with a page needs none before"


@pytest.mark.slow
def test_a_prompt_in_chunks_takes_its_windows_as_they_come() -> None:
    """Where everything is seen, the pages of the whole prompt are there from the start: what has begun shall end."""
    engine, prompt = hybrid(max_num_batched_tokens=32), random_prompts(3, [200])[0]
    engine.add_request(prompt, greedy(10))
    held, outputs = held_after_steps(engine)
    assert held[0].tolist() == [2, 2, 13, 2]
    assert held.max(axis=0).tolist() == [4, 4, 14, 4]
    assert_oracle([prompt], outputs)


def test_requests_run_together_that_one_table_had_no_room_for() -> None:
    """60 pages of five layers are the bytes of 150 of two. With 15 pages each, four such requests fill them all; with groups
    they need four times 15 and three windows at most, and so a fifth one runs beside them."""
    engine = hybrid(num_pages=150, max_num_seqs=5)
    prompts = random_prompts(2, [30, 40, 20, 45, 33])
    ids = [engine.add_request(prompt, greedy(190)) for prompt in prompts]
    outputs = run(engine)
    assert engine.scheduler.num_preemptions == 0
    assert_oracle(prompts, [outputs[i] for i in ids])


def test_a_hit_needs_of_windows_only_the_last() -> None:
    engine = hybrid()
    cache = engine.scheduler.prefix_cache
    assert cache is not None
    shared, *tails = random_prompts(5, [128, 20, 20, 20, 20])
    prompts = [shared + tail for tail in tails]
    keys = page_keys(root_key(""), shared, PAGE)

    def cached_tokens(prompt: list[int]) -> int:
        request_id = engine.add_request(prompt, greedy(8))
        output = run(engine)[request_id]
        assert_oracle([prompt], [output])
        assert output.num_cached_tokens is not None
        return output.num_cached_tokens

    def forget(entries: range, columns: list[int]) -> None:
        """As if others had got these pages."""
        found = [cache.page(keys[i], column) for i in entries for column in columns]
        cache.forget(*(page for page in found if page is not None))

    assert cached_tokens(prompts[0]) == 0
    forget(range(6), [0, 1])
    forget(range(7), [3])
    assert cached_tokens(prompts[1]) == 128, "the chunk of token 128 begins with token 120, in the page of index 7"
    forget(range(6, 7), [1])
    assert cached_tokens(prompts[2]) == 0, "nowhere are all pages of a window of this group left in a row"
    forget(range(8), WINDOWED)
    assert cached_tokens(prompts[3][:100]) == 0
    forget(range(1, 2), [2])
    assert cached_tokens(prompts[3]) == 16, "so far no window reaches back, and no page is missing that everybody reads"


@pytest.mark.slow
@pytest.mark.parametrize("num_pages", [pytest.param(200, marks=pytest.mark.extra), 42])
def test_samples_hits_preemption_and_beams(num_pages: int) -> None:
    """The small pool preempts; what comes is what each request gives alone."""
    sampled = SamplingParams(n=3, seed=1, max_tokens=90, output_kind=OutputKind.FINAL_ONLY)
    beams = greedy(30, n=3, use_beam_search=True)
    work = list(zip(random_prompts(4, [70, 100, 60, 50]), [sampled, greedy(60), sampled, beams], strict=True))

    def tokens(engine: Engine, work: Sequence[tuple[list[int], SamplingParams]]) -> list[list[list[int]]]:
        ids = [engine.add_request(prompt, params) for prompt, params in work]
        outputs = run(engine)
        return [[list(o.token_ids) for o in outputs[i].outputs] for i in ids]

    want = [tokens(hybrid(max_num_seqs=8), [one])[0] for one in work]
    engine = hybrid(num_pages=num_pages, max_num_seqs=8)
    assert tokens(engine, work) == want
    assert (engine.scheduler.num_preemptions > 0) == (num_pages == 42)
    assert tokens(engine, work) == want
    cache = engine.scheduler.prefix_cache
    assert cache is not None and (cache.hits > 0 or num_pages == 42)


def test_what_the_pool_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A text of n pages needs n of them for one group, and for the six others what 8 tokens and a chunk of 32 may touch: 4."""
    path = write_checkpoint(tmp_path / "gemma3", "gemma3_text")

    def plan(num_pages: int, **options: int) -> Build:
        sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "block_size": 16, "num_gpu_blocks_override": num_pages}
        config = EngineConfig.from_options(model=str(path), skip_tokenizer_init=True, **sizes | options)
        return plan_build(config, open_source(str(path)), make_mesh(1))

    build = plan(6 * 4 + 10)
    assert build.layout.reaches == (Reach(8),) * 6 + (Reach(),)
    assert build.pages_per_slot == longest_request(build) // 16 == 10
    assert "max_model_len is 160" in caplog.text
    assert tokens_held(build) == 34 * 160 // (6 * 2 + 10), "while they decode, windows take two pages"
    assert build.page_bytes == 16 * 2 * 2 * 32 * 4, "a page of each group is one layer's"
    with pytest.raises(ConfigError, match="max_model_len is 176 tokens, but the KV pool holds 160"):
        plan(6 * 4 + 10, max_model_len=176)
    short = plan(7 * 3, max_model_len=48)
    assert [short.buckets().column_pages, longest_request(short)] == [(3,) * 7, 48]


@pytest.mark.extra
def test_gemma3(tmp_path: Path) -> None:
    """Seven layers, of which the sixth sees everything and the others 8 tokens; prompts of 48."""
    path = write_checkpoint(tmp_path / "gemma3", "gemma3_text")
    prompts = [tokens.tolist() for tokens in read_golden("gemma3_text")[0]]
    options = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 64}
    with LLM(str(path), skip_tokenizer_init=True, **options) as llm:
        assert (
            llm.engine.description["page tables"]
            == "7 a request, each of up to 1 layers: 6 of windows of 8 tokens, 1 of all tokens"
        )
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy(60, ignore_eos=True))
    model, weights = open_and_load(path)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = prompt + list(output.outputs[0].token_ids)
        logits = forward(model, weights, np.array([tokens]))[0, len(prompt) - 1 : -1]
        chosen = logits[np.arange(60), tokens[len(prompt) :]]
        assert np.all(chosen >= logits.max(axis=-1) - 1e-3)
