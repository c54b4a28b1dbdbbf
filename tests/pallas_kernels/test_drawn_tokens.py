"""The kernel that draws, in the interpreter and on an NVIDIA GPU, against the sampler's way by XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve import sampler
from jaxserve.pallas_kernels.drawn_tokens import mosaic_gpu
from jaxserve.plan import POSITION, SLOT
from jaxserve.request import RequestGroup, sample_fields
from jaxserve.sampler import NO_TOKEN, Mode
from jaxserve.sampling_params import SamplingParams
from tests.pallas_kernels.test_kept_tokens import rows_of

ASKED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=20),
    SamplingParams(top_p=0.8),
    SamplingParams(temperature=0.01, min_p=0.1),
]
KINDS = ["normal", "ties", "banned", "equal", "one left"]
LEAST_KEPT = sampler.least_kept


def fields_of(rows: int, seed: int) -> jax.Array:
    """Sample rows that ask for each of ASKED in turn."""
    found = []
    for row in range(rows):
        group = RequestGroup("", [1], ASKED[row % len(ASKED)], 16, frozenset())
        fields = sample_fields(group, seed + row)
        fields[SLOT], fields[POSITION] = row, 3 * row
        found.append(fields)
    return jnp.asarray(np.stack(found))


def score(logits: np.ndarray, fields: jax.Array) -> np.ndarray:
    """What XLA compares, of every token: the kernel's tokens must have the largest, but for what a logarithm's rounding decides."""
    noise = sampler._noise(fields, logits.shape[1])
    cuts = sampler.cuts_of(fields)
    drawn = np.asarray(fields[:, sampler.TEMPERATURE]).view(np.float32) > 0
    least = np.asarray(sampler.least_kept(jnp.asarray(logits), cuts, "xla"))
    scaled = np.asarray(jnp.asarray(logits) * cuts.scale[:, None])
    kept = np.where(np.asarray(sampler.order_of(jnp.asarray(scaled))) >= least[:, None], scaled, -np.inf)
    return np.where(drawn[:, None], kept + np.asarray(noise), logits)


def check(logits: np.ndarray, seed: int) -> None:
    fields = fields_of(len(logits), seed)
    tokens = np.asarray(sampler.sample(jnp.asarray(logits), fields, Mode.FULL, implementation="mosaic_gpu")[0]["tokens"])
    scores = score(logits, fields)
    best, rows = scores.max(axis=1), np.arange(len(logits))
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
    np.testing.assert_allclose(scores[rows, tokens], best, rtol=1e-5, atol=1e-5)
    greedy = np.arange(len(logits)) % len(ASKED) == 0
    np.testing.assert_array_equal(tokens[greedy], logits[greedy].argmax(axis=1))


def every_case(vocab: int, seed: int) -> np.ndarray:
    return np.concatenate([rows_of(kind, len(ASKED), vocab, seed) for kind in KINDS])


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two kernels the one that draws; and thread blocks of few tokens."""
    monkeypatch.setattr(mosaic_gpu, "LINES", 2)
    monkeypatch.setattr(sampler, "least_kept", lambda logits, cuts, _: LEAST_KEPT(logits, cuts, "xla"))
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("vocab", [512, 2700])
def test_kernel_in_the_interpreter(vocab: int) -> None:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        check(every_case(vocab, 3)[:: 1 if vocab < 600 else 3], 5)


@pytest.mark.usefixtures("interpreted")
def test_no_token_comes_of_logits_that_are_none() -> None:
    logits = rows_of("normal", 6, 600, 1)
    logits[0, 599] = logits[1, 0] = np.nan
    logits[2, 5], logits[3], logits[4] = np.inf, np.nan, -np.inf
    fields = fields_of(10, 1)[jnp.array([0, 1, 6, 5, 1, 1])]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        tokens = sampler.sample(jnp.asarray(logits), fields, Mode.FULL, implementation="mosaic_gpu")[0]["tokens"].tolist()
    assert tokens[:5] == [NO_TOKEN] * 5 and tokens[5] >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [512, 4097, 50257, 128256, 151936, 262144])
def test_kernel_on_the_gpu(vocab: int) -> None:
    check(every_case(vocab, 3), 5)
