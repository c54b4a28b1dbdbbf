"""Experts of few tokens: the choice and the products, in the interpreters here and on an NVIDIA GPU (pytest -m gpu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.models.layers.router import score, shaped
from jaxserve.models.spec import RouterSpec
from jaxserve.pallas_kernels.few_experts import TOKENS, Choice, choose, mosaic_gpu, multiply, reference, serves

Activation = Callable[[jax.Array], jax.Array]


def scores(num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Scores, and what chooses: the same and something else."""
    rng = np.random.default_rng(num_experts)
    score = jax.nn.softmax(jnp.asarray(rng.standard_normal((TOKENS, num_experts)), jnp.float32))
    return score, score + jnp.asarray(rng.uniform(size=num_experts), jnp.float32)


def as_they_are(*scores: jax.Array) -> Any:
    return scores


def assert_same_choice(got: Choice, want: Choice) -> None:
    num = int(want.num_blocks[0])
    assert got.num_blocks.tolist() == [num]
    in_use = np.asarray(want.blocks[:, 0] >= 0)
    np.testing.assert_allclose(got.weights[in_use], want.weights[in_use], rtol=1e-4)  # exp of a GPU
    assert np.isfinite(got.weights).all()
    np.testing.assert_array_equal(got.blocks, want.blocks)
    np.testing.assert_array_equal(got.experts[:num], want.experts[:num])


@pytest.mark.parametrize(
    ("num_experts", "top_k", "options", "used"),
    [(64, 6, {"scale": 2.0}, 1), (128, 8, {"normalize": True, "eps": 1e-3}, 16), (4, 3, {"normalize": True, "least": 2.0}, 0)],
)
def test_the_choice(num_experts: int, top_k: int, options: dict[str, Any], used: int) -> None:
    args = as_they_are, scores(num_experts), jnp.asarray([used]), top_k
    assert_same_choice(choose(*args, **options, interpret=True), reference.choose(*args, **options))


@pytest.mark.parametrize("is_interpreted", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
def test_scores_of_parts_are_made_in_the_kernel(rule: Any, is_interpreted: bool) -> None:
    """Three parts of the logits, with a bias on these and one on what chooses; what no token uses is not read."""
    rng = np.random.default_rng(3)
    parts = jnp.asarray(rng.standard_normal((3, TOKENS, 64)), jnp.float32)
    biases = [jnp.asarray(rng.standard_normal(64), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    rules = RouterSpec(scores=rule, logit_multiplier=0.5, logit_softcap=2.0)

    def score_parts(logits: jax.Array, bias: jax.Array, choice_bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        return score(shaped(logits, rules, bias), rules, choice_bias)

    args: Any = jnp.asarray([5]), 4
    want = reference.choose(score_parts, (parts, *biases), *args, normalize=True)
    got = choose(score_parts, (parts.at[:, 5:].set(jnp.nan), *biases), *args, normalize=True, interpret=is_interpreted)
    assert_same_choice(got, want)


def test_the_first_of_equals_is_chosen() -> None:
    equal = jnp.zeros((TOKENS, 8))
    got = choose(as_they_are, (equal, equal), jnp.asarray([1]), 3, interpret=True)
    assert got.experts[:3].tolist() == [0, 1, 2] and got.blocks[0].tolist() == [0, 1, 2]


def case(num_experts: int, depth: int, cols: int, used: int, top_k: int = 2) -> tuple[jax.Array, jax.Array, Choice]:
    rng = np.random.default_rng([num_experts, depth, cols])
    x = jnp.asarray(rng.standard_normal((TOKENS, depth)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((num_experts, depth, cols)) / depth**0.5, jnp.bfloat16)
    return x, w, reference.choose(as_they_are, scores(num_experts), jnp.asarray([used]), top_k)


def assert_same_product(got: jax.Array, want: jax.Array, choice: Choice) -> None:
    rows = int(choice.num_blocks[0]) * TOKENS
    assert got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got[:rows], np.float32), np.asarray(want[:rows], np.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("num_experts", "activation"), [(4, None), (2, jax.nn.silu)])
def test_products_in_the_interpreter(num_experts: int, activation: Activation | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that all blocks have alike, and of these products in turn, which each block has its own."""
    monkeypatch.setattr(mosaic_gpu, "CTAS", 2)
    monkeypatch.setattr(mosaic_gpu, "STAGES", 2)
    x, w, choice = case(num_experts, 128, 256, used=3)
    want = reference.multiply(x, w, choice, activation)
    down = w.transpose(0, 2, 1)[:, : want.shape[1], :64]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        assert_same_product(multiply(x, w, choice, activation), want, choice)
        assert_same_product(multiply(want, down, choice), reference.multiply(want, down, choice), choice)


def test_serves() -> None:
    assert serves(16, (128, 2048, 1536), (128, 768, 2048))
    assert not serves(64, (128, 2048, 1536), (128, 768, 2048))
    assert not serves(16, (60, 2048, 1536), (60, 768, 2048))
    assert not serves(16, (64, 2048, 1500), (64, 750, 2048))


@pytest.mark.gpu
@pytest.mark.parametrize("used", [1, 16])
@pytest.mark.parametrize(
    ("num_experts", "depth", "cols", "top_k", "activation"),
    [(128, 2048, 1536, 8, jax.nn.silu), (64, 1408, 2048, 6, None), (32, 2880, 5760, 4, None)],
)
def test_on_the_gpu(num_experts: int, depth: int, cols: int, top_k: int, activation: Activation | None, used: int) -> None:
    x, w, want = case(num_experts, depth, cols, used, top_k)
    got = jax.jit(lambda: choose(as_they_are, scores(num_experts), jnp.asarray([used]), top_k))()
    assert_same_choice(got, want)
    product = jax.jit(lambda: multiply(x, w, got, activation))()
    assert_same_product(product, reference.multiply(x, w, want, activation), want)
