"""The device sampler against NumPy: kept sets, distributions, penalties, independence of rows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from jaxserve import sampler, shaping, step
from jaxserve.pallas_kernels.drawn_tokens import threefry
from jaxserve.plan import NO_TARGET, POSITION, SAMPLE_FIELDS, SLOT, TARGET
from jaxserve.request import RequestGroup, sample_fields
from jaxserve.sampler import Mode, sample
from jaxserve.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("quickest_compiles")

V = 50


def group(params: SamplingParams, prompt: tuple[int, ...] = (1, 2, 3), stop_ids: frozenset[int] = frozenset()) -> RequestGroup:
    return RequestGroup("r", list(prompt), params, 16, stop_ids)


def rows(params: list[SamplingParams], seed: int = 0, position: int = 5, groups: list[RequestGroup] | None = None) -> jax.Array:
    groups = groups or [group(p) for p in params]
    fields = np.stack([sample_fields(g, seed + i) for i, g in enumerate(groups)])
    fields[:, SLOT] = np.arange(len(groups))
    fields[:, POSITION] = position
    return jnp.asarray(fields)


@cache
def compiled(mode: Mode) -> Any:
    return jax.jit(lambda logits, rows, state: sample(logits, rows, mode, state))


def draw(logits: np.ndarray, fields: jax.Array, mode: Mode, state: Any = None) -> dict[str, Any]:
    return compiled(mode)(jnp.asarray(logits), fields, state)[0]


def kept_tokens(probabilities: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The sampling distribution, the slow way: sort, cut, renormalise."""
    order = np.argsort(-probabilities, kind="stable")
    kept = np.zeros(len(probabilities), bool)
    kept[order[: params.top_k] if params.top_k > 0 else order] = True
    weights = np.where(kept, probabilities, 0)
    weights /= weights.sum()
    cumulative = np.cumsum(weights[order])
    nucleus = order[: np.searchsorted(cumulative, params.top_p - 1e-7) + 1]
    kept &= np.isin(np.arange(len(probabilities)), nucleus)
    kept &= probabilities >= params.min_p * probabilities.max()
    return np.where(kept, probabilities, 0) / probabilities[kept].sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 1.7, "top_k": 12, "top_p": 0.8}],
)
def test_distribution(options: dict[str, Any]) -> None:
    """Chi-square of 8,000 draws against the exact distribution; the 99.9 % point for the degrees of freedom."""
    params = SamplingParams(**options)
    rng = np.random.default_rng(0)
    logits = np.float32(rng.standard_normal(V) * 2)
    scaled = np.exp(logits / params.temperature - np.max(logits / params.temperature))
    expected = kept_tokens(scaled / scaled.sum(), params)
    mode = Mode.FULL if set(options) - {"temperature"} else Mode.PLAIN
    count = 8000
    fields = np.repeat(np.asarray(rows([params])), 1000, axis=0)
    drawn = []
    for i in range(count // 1000):
        fields[:, POSITION] = np.arange(i * 1000, (i + 1) * 1000)
        drawn.append(np.asarray(draw(np.tile(logits, (1000, 1)), jnp.asarray(fields), mode)["tokens"]))
    counts = np.bincount(np.concatenate(drawn), minlength=V)
    assert counts[expected == 0].sum() == 0, "a token outside the kept set was drawn"
    common = expected * count >= 5
    chi2 = ((counts - expected * count)[common] ** 2 / (expected * count)[common]).sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 3.1 * np.sqrt(2 * freedom) + 8


def test_greedy_takes_the_largest_in_every_mode() -> None:
    logits = np.random.default_rng(1).standard_normal((4, V)).astype(np.float32)
    fields = rows([SamplingParams(temperature=0.0)] * 4)
    for mode in Mode:
        state = zeros(4) if mode.needs_shaping else None
        np.testing.assert_array_equal(draw(logits, fields, mode, state)["tokens"], logits.argmax(-1))


def test_a_row_depends_on_itself_alone() -> None:
    """The same row among other neighbours, parameters and positions gives the same token, in each mode that can do it."""
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((6, V)).astype(np.float32)
    mine = SamplingParams(temperature=0.9)
    others = [SamplingParams(top_k=3), SamplingParams(temperature=0.0), SamplingParams(top_p=0.3), SamplingParams(min_p=0.5)]
    fields = np.array(rows([mine, *others, mine], seed=7))
    alone = int(draw(logits[:1], rows([mine], seed=7), Mode.PLAIN)["tokens"][0])
    for mode in (Mode.FULL, Mode.SHAPED, Mode.LOGPROBS):
        state = zeros(6) if mode.needs_shaping else None
        assert int(draw(logits, jnp.asarray(fields), mode, state)["tokens"][0]) == alone


def test_seed_and_position_choose_the_noise() -> None:
    logits = np.zeros((1, V), np.float32)
    params = [SamplingParams()]
    token = {
        (seed, position): int(draw(logits, rows(params, seed, position), Mode.PLAIN)["tokens"][0])
        for seed in (3, 4, 3 + 2**40)
        for position in range(8)
    }
    assert token == {key: int(draw(logits, rows(params, *key), Mode.PLAIN)["tokens"][0]) for key in token}
    assert len({tuple(token[seed, p] for p in range(8)) for seed in (3, 4, 3 + 2**40)}) == 3


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = np.random.default_rng(3).standard_normal((2, V)).astype(np.float32)
    fields = np.array(rows([SamplingParams(temperature=0.3, logprobs=3)] * 2))
    fields[1, TARGET] = 17
    out = draw(logits, jnp.asarray(fields), Mode.LOGPROBS, zeros(2))
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = [int(out["tokens"][0]), 17]
    np.testing.assert_allclose(out["logprob"], want[np.arange(2), chosen], rtol=1e-5)
    np.testing.assert_array_equal(out["rank"], [1 + (want[i] > want[i, t]).sum() for i, t in enumerate(chosen)])
    np.testing.assert_array_equal(out["top_ids"], np.argsort(-want, axis=-1)[:, :20])
    np.testing.assert_allclose(out["all_logprobs"], want, rtol=1e-5, atol=1e-6)


def zeros(slots: int) -> shaping.Shaping:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shaping.shape_like(slots, V))


def test_shaping_matches_numpy_and_leaves_neighbours_alone() -> None:
    logits = np.random.default_rng(4).standard_normal((3, V)).astype(np.float32)
    params = SamplingParams(
        temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3, logit_bias={9: 2.0}, min_tokens=4
    )
    shaped, plain = group(params, (1, 2), frozenset({11})), group(SamplingParams(temperature=0.0))
    row = shaping.host_row(V, [1, 2], [5, 5, 6], {9: 2.0}, None, frozenset({11}))
    state = jax.jit(shaping.set_row)(zeros(3), row, 1)
    fields = np.array(rows([], groups=[plain, shaped, plain]))
    fields[:, POSITION] = 5  # three output tokens so far: the stop id 11 is still held back
    got = np.asarray(jax.jit(shaping.shape_logits)(logits, state, fields))
    want = logits[1].copy()
    want[9] += 2.0
    for token in (1, 2, 5, 6):
        want[token] = want[token] / 1.3 if want[token] > 0 else want[token] * 1.3
    want[5] -= 2 * 0.25 + 0.5
    want[6] -= 0.25 + 0.5
    want[11] = -np.inf
    np.testing.assert_allclose(got[1], want, rtol=1e-5)
    np.testing.assert_array_equal(got[[0, 2]], logits[[0, 2]])
    fields[1, POSITION] = 6
    assert np.isfinite(jax.jit(shaping.shape_logits)(logits, state, fields)[1, 11])


def test_counts_follow_the_sampled_tokens() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    fields = rows([params, SamplingParams(temperature=0.0)])
    logits = np.zeros((2, V), np.float32)
    logits[:, 7] = 3.0
    state, tokens = zeros(2), []
    for _ in range(5):
        out, state = compiled(Mode.SHAPED)(jnp.asarray(logits), fields, state)
        tokens.append(np.asarray(out["tokens"]).tolist())
    assert [t[1] for t in tokens] == [7] * 5
    assert [t[0] for t in tokens] == [7, 7, 7, 0, 1]  # 3, 2, 1 left; then the zeros, each once
    assert int(state.output_counts[1].sum()) == 0


def test_allowed_ids_ban_the_rest() -> None:
    row = shaping.host_row(V, [1], [], {}, (4, 8), frozenset())
    state = jax.jit(shaping.set_row)(zeros(1), row, 0)
    fields = np.repeat(np.asarray(rows([SamplingParams(allowed_token_ids=(4, 8))])), 1, axis=0)
    seen = set()
    for position in range(30):
        fields[:, POSITION] = position
        seen.add(int(draw(np.zeros((1, V), np.float32), jnp.asarray(fields), Mode.SHAPED, state)["tokens"][0]))
    assert seen == {4, 8}
    assert fields.shape[1] == SAMPLE_FIELDS


@pytest.mark.parametrize("mode", [Mode.SHAPED, Mode.LOGPROBS])
def test_a_branching_sampler_does_what_the_rows_need(mode: Mode) -> None:
    """The same tokens and counts as the least mode that covers them all, whatever that is, beside a row that is not in use."""
    branching = jax.jit(lambda logits, rows, state: sample(logits, rows, mode, state, is_branching=True))
    logits = np.random.default_rng(5).standard_normal((4, V)).astype(np.float32)
    state = replace(zeros(4), bias=jnp.asarray(3 * logits[::-1]))
    asked = {
        Mode.GREEDY: SamplingParams(temperature=0.0, top_k=3),
        Mode.PLAIN: SamplingParams(),
        Mode.FULL: SamplingParams(top_p=0.4, min_p=0.01),
        Mode.SHAPED: SamplingParams(temperature=0.0, logit_bias={3: 5.0}),
    }
    for count, least in enumerate(asked, start=1):
        fields = np.zeros((4, SAMPLE_FIELDS), np.int32)
        fields[:, SLOT] = 4
        fields[:, TARGET] = NO_TARGET
        fields[:3] = np.asarray(rows([list(asked.values())[(count - 1 - i) % count] for i in range(3)]))
        needs = least.needs_shaping
        want, want_state = compiled(least)(jnp.asarray(logits), fields, state if needs else None)
        got, got_state = branching(jnp.asarray(logits), fields, state)
        np.testing.assert_array_equal(got["tokens"], want["tokens"], err_msg=least.value)
        assert int(got_state.output_counts.sum()) == (int(want_state.output_counts.sum()) if needs else 0)


def test_the_noise_is_threefry() -> None:
    """With all 20 rounds, the words that jax makes."""
    keys, counter = np.array([[123456789, 2**32 - 5], [0, 0]], np.uint32), np.arange(100, dtype=np.uint32)
    key0, key1 = keys.view(np.int32).T[..., None]
    got = np.asarray(threefry(key0, key1, counter.view(np.int32)[None], rounds=20)).view(np.uint32)
    for key, words in zip(keys, got, strict=True):
        np.testing.assert_array_equal(words, threefry_2x32(key, np.concatenate([counter, np.zeros_like(counter)]))[:100])


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_logits_that_are_not_finite_give_their_row_no_token(mode: Mode) -> None:
    """NaN of either sign, wherever it is, infinity, or all banned; whatever is asked."""
    asked = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.5, min_p=0.1)]
    logits = np.random.default_rng(2).standard_normal((4 * 6, V)).astype(np.float32)
    for i, params in enumerate(asked):
        bad = logits[6 * i : 6 * i + 5]
        bad[0, 0], bad[1, V - 1], bad[2, 7], bad[3], bad[4] = np.nan, -np.float32(np.nan), np.inf, -np.inf, np.nan
        asked[i] = params if mode is not Mode.GREEDY else asked[0]
    fields = rows([params for params in asked for _ in range(6)])
    state = zeros(len(logits)) if mode.needs_shaping else None
    tokens = np.asarray(draw(logits, fields, mode, state)["tokens"]).reshape(4, 6)
    assert (tokens[:, :5] == sampler.NO_TOKEN).all()
    assert (tokens[:, 5] >= 0).all()


@pytest.mark.parametrize("size", [5, 256, 1000])
def test_the_largest_is_where_argmax_has_it(size: int) -> None:
    """The first of equal ones, across tiles too, and something where all are banned."""
    x = np.random.default_rng(1).integers(-3, 3, (6, size)).astype(np.float32)
    x[1], x[2, size // 2], x[3, [1, -1]], x[4, -1] = -np.inf, np.inf, np.inf, 9
    place, largest = jax.jit(sampler._find_largest)(x)
    np.testing.assert_array_equal(place, np.argmax(x, axis=-1))
    np.testing.assert_array_equal(largest, np.max(x, axis=-1))


def test_the_likeliest_tokens_are_those_of_a_sort() -> None:
    """Of a vocabulary of many tiles, the last one not full, with equal values in and across tiles."""
    logprobs = np.random.default_rng(6).integers(-40, 0, (3, 5 * 2048 + 1)).astype(np.float32)
    logprobs[0, -1], logprobs[1], logprobs[2, :-5] = 1, -1, -np.inf
    values, ids = jax.jit(lambda x: sampler._likeliest(x, 20))(logprobs)
    want = np.argsort(-logprobs, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_array_equal(values, np.take_along_axis(logprobs, want, axis=-1))


def test_blocks_of_rows_are_sampled_as_all_are() -> None:
    """Of each of the results; also where a block ends past them."""
    mode, rng = Mode.SHAPED, np.random.default_rng(7)
    params = [SamplingParams(top_p=0.9), SamplingParams(temperature=0.0, frequency_penalty=2.0), SamplingParams(top_k=3)]
    results = []
    for size in (2, 4, 10):
        fields = np.array(rows([params[i % 3] for i in range(size)], seed=size))
        fields[-1, SLOT] = 10
        results.append(step.ForwardResults(jnp.asarray(rng.standard_normal((size, V)), jnp.float32), jnp.asarray(fields)))
    block = jax.jit(partial(step.sample_block, rows=4, mode=mode))
    whole = jax.jit(partial(step.sample, mode=mode))
    for which, result in enumerate(results):
        last, state, tokens = jnp.full(10, -7), zeros(10), []
        for start in range(0, len(result.logits), 4):
            last, state, out = block(tuple(results), jnp.array([which, start]), last, state)
            tokens += out["tokens"].tolist()
        want_last, want_state, want = whole(result, jnp.full(10, -7), zeros(10))
        assert tokens[: len(result.logits)] == want["tokens"].tolist()
        np.testing.assert_array_equal(last, want_last)
        np.testing.assert_array_equal(state.output_counts, want_state.output_counts)
