"""The declared programs: how many, which buckets, nothing compiled after ready, no copy of the pool."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Sharding

from jaxserve import sharding
from jaxserve.buckets import Buckets, choose_buckets
from jaxserve.engine import Engine
from jaxserve.models.interface import Runtime
from jaxserve.plan import PlanShape
from jaxserve.programs import declare_programs
from jaxserve.runner import Runner
from jaxserve.sampler import Mode
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.step_plan import StepPlan
from jaxserve.step_runner import InFlight
from tests.tiny import compiled_inputs, compiled_programs, greedy, random_prompts, run, tiny_engine


def gpu_buckets() -> Buckets:
    return choose_buckets("gpu", 256, 8192, pages_per_slot=512, page_size=16)


def test_buckets_are_a_short_list() -> None:
    buckets = gpu_buckets()
    assert buckets.decode == (16, 64, 256)
    assert buckets.tokens == (384, 1024, 8192), "all requests' tokens and few of prompts; a middle; all"
    repeated = choose_buckets("gpu", 256, 8192, pages_per_slot=512, page_size=16, num_steps=4).repeated_shapes
    assert [(shape.num_rows, shape.num_steps) for shape in repeated.values()] == [
        (16, 4),
        (64, 4),
    ] and not buckets.repeated_shapes
    assert choose_buckets("gpu", 256, 512, pages_per_slot=512, page_size=16).tokens == (512,)
    assert choose_buckets("gpu", 1024, 2048, pages_per_slot=512, page_size=16).tokens == (2048,)
    assert len(buckets.shapes) <= 10
    assert set(buckets.samples) >= {256}


@pytest.mark.parametrize("rows, tokens", [(1, 1), (2, 2), (200, 200), (1, 5), (256, 300), (3, 8192)])
def test_the_chosen_plan_holds_the_step(rows: int, tokens: int) -> None:
    buckets = gpu_buckets()
    shape = buckets.choose(rows, tokens, rows, rows)
    assert shape in buckets.shapes
    assert shape.num_rows >= rows and shape.num_tokens >= tokens and shape.num_samples >= rows
    assert shape.num_page_updates >= rows


def test_a_prefix_hit_or_fork_takes_a_program_that_holds_it() -> None:
    """One token to compute, but a whole table of pages, or many samples."""
    buckets = gpu_buckets()
    assert buckets.choose(1, 1, 1, 512).num_page_updates >= 512
    assert buckets.choose(1, 1, 256, 1).num_samples == 256


def test_nothing_compiles_after_ready(compiled_in_steps: list[str]) -> None:
    """Whatever the requests ask for."""
    engine = tiny_engine(num_pages=20)
    run_every_kind(engine)
    assert compiled_in_steps == []


def run_every_kind(engine: Engine) -> None:
    """All samplers, forks with copies, beams, prompt and output log probabilities, prefix hits, preemption, an abort."""
    final = OutputKind.FINAL_ONLY
    kinds = [
        greedy(30),
        SamplingParams(seed=1, max_tokens=30, output_kind=OutputKind.DELTA),
        SamplingParams(seed=1, top_p=0.5, top_k=3, max_tokens=30, output_kind=final),
        SamplingParams(seed=1, frequency_penalty=1.0, n=3, max_tokens=30, output_kind=final),
        greedy(20, logprobs=-1, prompt_logprobs=2),
        greedy(20, n=3, use_beam_search=True),
    ]
    for kind in kinds:
        engine.add_request(list(range(1, 60)), kind)
    aborted = engine.add_request([5] * 30, greedy(30))
    engine.step()
    engine.abort(aborted)
    run(engine)


def shardings_of(engine: Engine, seen: dict[int, Sharding], monkeypatch: pytest.MonkeyPatch) -> None:
    """Collects the sharding objects of all that comes out of a step, and keeps them, so that no id is used twice."""
    dispatch = engine.runner.dispatch

    def watched(plan: StepPlan) -> InFlight:
        step = dispatch(plan)
        runner = engine.runner
        arrays = jax.tree.leaves((runner._state, runner._last_tokens, runner._packed, runner._shaping, step.outputs))
        seen.update((id(array.sharding), array.sharding) for array in arrays)
        return step

    monkeypatch.setattr(engine.runner, "dispatch", watched)


@pytest.mark.slow
def test_several_steps_in_a_program_give_the_same_tokens(compiled_in_steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's lists of programs, compiled for the CPU: rows that several steps are planned for, then beside some that end that."""
    final = OutputKind.FINAL_ONLY
    plain = [greedy(20), SamplingParams(seed=1, max_tokens=17, output_kind=OutputKind.CUMULATIVE), greedy(2)]
    others = [
        SamplingParams(seed=2, top_p=0.5, top_k=3, max_tokens=9, output_kind=final),
        SamplingParams(seed=3, frequency_penalty=1.0, max_tokens=9, output_kind=final),
        greedy(9, logprobs=2),
    ]
    texts = []
    for changes in ({}, {"platform": "gpu"}, {"platform": "gpu", "num_steps": 4}):
        engine = tiny_engine(max_num_seqs=8, **changes)
        engine.runner.warm_up()
        seen = steps_of_programs(engine, monkeypatch)
        found: list[Any] = []
        for kinds in (plain, plain + others):
            ids = [engine.add_request(*work) for work in zip(random_prompts(4, (5, 9, 3, 7, 2, 4)), kinds, strict=False)]
            outputs = run(engine)
            found += [outputs[request_id].outputs[0].token_ids for request_id in ids]
        texts.append(found)
        assert set(seen) == {1, changes.get("num_steps", 1)}
    assert len(texts[0]) == 9
    assert texts[0] == texts[1] == texts[2]
    assert compiled_in_steps == []


def steps_of_programs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Is filled with the numbers of steps of the programs that run."""
    found: list[int] = []
    assert isinstance(engine.runner, Runner)
    run = engine.runner.run

    def watched(shape: PlanShape, *args: Any) -> Any:
        found.append(shape.num_steps)
        return run(shape, *args)

    monkeypatch.setattr(engine.runner, "run", watched)
    return found


@pytest.mark.slow
def test_warming_up_leaves_no_trace(compiled_in_steps: list[str]) -> None:
    """Nothing is compiled, and requests get the tokens that they would have got; pages and recurrent states have been written."""
    outputs = []
    for is_warm in (False, True):
        engine = tiny_engine(recurrent=True)
        if is_warm:
            engine.runner.warm_up()
        for prompt in random_prompts(3, (5, 70)):
            engine.add_request(prompt, greedy(12, logprobs=2, presence_penalty=0.5))
        outputs.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in run(engine).values()])
    assert outputs[0] == outputs[1]
    assert compiled_in_steps == []


@pytest.mark.slow
def test_steps_run_compiled_programs_alone(compiled_in_steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """jax forgets what it has compiled, so an eager operation, or any jit but the declared programs, would compile anew."""
    engine = tiny_engine(num_pages=20, max_num_seqs=8)
    run_every_kind(engine)
    assert engine.scheduler.num_preemptions
    jax.clear_caches()
    shardings: dict[int, Sharding] = {}
    shardings_of(engine, shardings, monkeypatch)
    run_every_kind(engine)
    known = set(shardings)
    monkeypatch.setattr(sharding, "NamedSharding", lambda *_: pytest.fail("a step makes a sharding"))
    run_every_kind(engine)
    assert compiled_in_steps == []
    assert set(shardings) == known


def test_an_eager_operation_in_a_step_is_seen(compiled_in_steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    dispatch = engine.runner.dispatch

    def dispatch_eagerly(plan: StepPlan) -> InFlight:
        step = dispatch(plan)
        engine.runner._last_tokens = engine.runner._last_tokens + 0
        return step

    monkeypatch.setattr(engine.runner, "dispatch", dispatch_eagerly)
    for _ in range(2):  # the second time it would be in jax's caches
        jax.clear_caches()
        del compiled_in_steps[:]
        engine.add_request([1], greedy(1))
        run(engine)
        assert any("add" in name for name in compiled_in_steps)
    del compiled_in_steps[:]


def test_a_compilation_in_a_step_is_seen(compiled_in_steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    dispatch = engine.runner.dispatch

    def compile_and_dispatch(plan: StepPlan) -> InFlight:
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
        return dispatch(plan)

    monkeypatch.setattr(engine.runner, "dispatch", compile_and_dispatch)
    engine.add_request([1], greedy(1))
    engine.step()
    assert any("lambda" in name for name in compiled_in_steps), compiled_in_steps
    del compiled_in_steps[:]


def test_the_pool_is_updated_in_place() -> None:
    forwards = {key: program for key, program in compiled_programs().compiled.items() if isinstance(key, PlanShape)}
    assert forwards
    for shape, program in forwards.items():
        text = program.as_text()
        pool = next(m for m in re.findall(r"f32\[64,16,4,16\]", text))
        copies = [line for line in text.splitlines() if re.search(rf"= {re.escape(pool)}\S* copy\(", line)]
        assert not copies, f"{shape} copies the pool: {copies[:2]}"
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * 64 * 16 * 4 * 16 * 4, "the pool is not donated"


def test_each_mode_and_size_has_a_sample_program() -> None:
    programs, buckets = compiled_programs(), tiny_engine().runner.buckets
    for mode in Mode:
        covering = programs.sample_mode(mode)
        assert list(Mode).index(covering) >= list(Mode).index(mode)
        assert programs.sample_block(covering) or all((n, covering) in programs.compiled for n in buckets.samples)


@pytest.mark.parametrize(
    "platform, attention, sizes, most",
    [
        ("cpu", "xla", (16, 512), 12),
        ("tpu", "mosaic_tpu", (256, 8192), 13),
        ("gpu", "mosaic_gpu", (256, 8192), 14),
        ("gpu", "xla", (256, 8192), 15),
    ],
)
def test_the_declared_list_is_short(platform: Any, attention: Any, sizes: tuple[int, int], most: int) -> None:
    """At the default sizes."""
    inputs = compiled_inputs()
    buckets = choose_buckets(platform, *sizes, pages_per_slot=512, page_size=16)
    runtime = Runtime(platform, inputs.shardings.mesh, attention)
    programs = declare_programs(replace(inputs, buckets=buckets), lambda *_: pytest.fail("traced"), runtime)
    assert len(programs) == most
    assert len({program.key for program in programs}) == most


def test_forward_programs_whose_kernels_wait_for_others_run_in_order() -> None:
    inputs = compiled_inputs()
    for peer_sums in (True, False):
        runtime = Runtime("gpu", inputs.shardings.mesh, peer_sums=peer_sums)
        for program in declare_programs(inputs, lambda *_: pytest.fail("traced"), runtime):
            is_bound = program.options.get("xla_gpu_command_buffer_scheduling_mode") == "SERIALIZE"
            assert is_bound == (peer_sums and isinstance(program.key, PlanShape)), program.name
