"""Experts: both ways of summing them against one expert at a time, and routers against their definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.models.interface import Runtime
from jaxserve.models.layers.mlp import activate
from jaxserve.models.layers.moe import Moe
from jaxserve.models.layers.quantized import quantize_fp8
from jaxserve.models.layers.router import route
from jaxserve.models.spec import ClampedSwiglu, MlpSpec, MoeSpec, RouterSpec
from jaxserve.pallas_kernels import few_experts
from jaxserve.pallas_kernels.few_experts import reference
from jaxserve.sharding import make_mesh
from tests.models.forward import prompts_batch

RNG = np.random.default_rng(0)
D, F, E, K = 8, 12, 4, 2
EXPERT = MlpSpec(dim=F, activation="silu")
SPEC = MoeSpec(num_experts=E, top_k=K, expert=EXPERT, router=RouterSpec())
BIASED = replace(EXPERT, bias=True, clamped=ClampedSwiglu(alpha=1.3, limit=0.5))


def normal(*shape: int) -> Any:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # sorted by expert, and all tokens through all experts
@pytest.mark.parametrize("changes", [{}, {"expert": BIASED}, {"weight_on_input": True}])
def test_sum_of_experts(changes: dict[str, Any], platform: Any, devices: int) -> None:
    spec = replace(SPEC, **changes)
    moe = Moe(D, spec, jnp.float32)
    for array in (moe.router, moe.experts_up, moe.experts_down, moe.experts_up_bias, moe.experts_down_bias):
        if array is not None:
            array.set_value(normal(*array.get_value().shape))
    batch, _ = prompts_batch(np.zeros((1, 13), np.int64), padding=7)
    x = normal(20, D)  # with 16 a GPU sorts too
    weights, experts = route(x @ moe.router.get_value(), spec.router, K)
    want = np.zeros((13, D), np.float32)
    for t in range(13):
        for weight, e in zip(weights[t], experts[t], strict=True):
            row = x[t] * weight if spec.weight_on_input else x[t]
            up = row @ moe.experts_up.get_value()[e]
            up += 0 if moe.experts_up_bias is None else moe.experts_up_bias.get_value()[e]
            out = activate(spec.expert, up.reshape(1, 2, F))[0] @ moe.experts_down.get_value()[e]
            out += 0 if moe.experts_down_bias is None else moe.experts_down_bias.get_value()[e]
            want[t] += out if spec.weight_on_input else out * weight
    runtime = Runtime(platform, make_mesh(devices))
    got = jax.jit(lambda x: moe(x, batch, runtime))(x)
    np.testing.assert_allclose(got[:13], want, rtol=2e-4, atol=2e-4)
    assert np.isfinite(got).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert": replace(BIASED, dim=64)},
        {"router": RouterSpec(scores="sigmoid", choice_bias=True, num_groups=2, scale=2.0)},
    ],
)
def test_few_tokens_sum_the_same_experts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's smallest step, its kernels in plain jnp, against experts one group after the other."""
    spec = replace(SPEC, num_experts=8, **({"expert": replace(EXPERT, dim=64)} | changes))
    moe = Moe(64, spec, jnp.bfloat16)
    for array in jax.tree.leaves(nnx.state(moe), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        array.set_value(jnp.asarray(normal(*array.get_value().shape) / 8, array.get_value().dtype))
    batch, _ = prompts_batch(np.zeros((1, 13), np.int64), padding=3)
    x = normal(16, 64).astype(jnp.bfloat16)
    want = moe(x, batch, Runtime("cpu"))
    calls = []

    def multiply(*args: Any) -> jax.Array:
        calls.append(args)
        return reference.multiply(*args)

    monkeypatch.setattr(few_experts, "choose", reference.choose)
    monkeypatch.setattr(few_experts, "multiply", multiply)
    got = moe(x, batch, Runtime("gpu", attention="mosaic_gpu"))
    assert len(calls) == 2
    np.testing.assert_allclose(got[:13].astype(jnp.float32), want[:13].astype(jnp.float32), rtol=5e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_experts_of_8_bits_are_multiplied_as_the_numbers_they_stand_for(platform: Any, devices: int) -> None:
    moe, plain = Moe(D, SPEC, jnp.float32), Moe(D, SPEC, jnp.float32)
    moe.router.set_value(normal(D, E))
    plain.router.set_value(moe.router.get_value())
    for name in ("experts_up", "experts_down"):
        weight = quantize_fp8(normal(*getattr(moe, name).get_value().shape), contract=1, batch=1)
        getattr(moe, name).set_value(weight)
        getattr(plain, name).set_value(jnp.moveaxis(weight.values.astype(jnp.float32) * weight.scales[..., None], -1, 1))
    batch, _ = prompts_batch(np.zeros((1, 13), np.int64), padding=7)
    x, runtime = normal(20, D), Runtime(platform, make_mesh(devices))
    np.testing.assert_allclose(moe(x, batch, runtime), plain(x, batch, runtime), rtol=2e-4, atol=2e-4)


def test_the_best_groups_are_those_with_the_best_two() -> None:
    spec = RouterSpec(scores="sigmoid", choice_bias=True, num_groups=2, top_groups=1, group_score="best_two")
    logits = jnp.asarray([[3.0, -9.0, -9.0, 2.0, 2.0, -9.0]])
    assert sorted(route(logits, spec, 2, jnp.zeros(6))[1][0].tolist()) == [3, 4]
    assert min(route(logits, replace(spec, group_score="best"), 2, jnp.zeros(6))[1][0].tolist()) == 0


def test_the_choice_bias_changes_no_weight() -> None:
    spec, bias = RouterSpec(scores="sigmoid", choice_bias=True, normalize=False, scale=2.0), jnp.asarray([0.0, 0.0, 5.0])
    weights, experts = route(jnp.asarray([[2.0, 1.0, -1.0]]), spec, 1, bias)
    assert experts.tolist() == [[2]]
    np.testing.assert_allclose(weights, 2 / (1 + np.exp(1.0)), rtol=1e-5)


def test_weights_of_the_chosen_sum_to_one() -> None:
    logits = normal(5, E)
    np.testing.assert_allclose(route(logits, RouterSpec(), K)[0].sum(-1), 1, rtol=1e-5)
    plain = route(logits, RouterSpec(normalize=False), K)[0].sum(-1)
    assert (plain < 1).all()
    np.testing.assert_allclose(
        route(logits, RouterSpec(norm_min=4.0), K)[0], route(logits, RouterSpec(normalize=False), K)[0] / 4
    )


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2 groups cannot be chosen among 4 experts"):
        replace(SPEC, router=RouterSpec(num_groups=2, top_groups=3))
    with pytest.raises(ValueError, match="each token must have from 1 to 4 experts; got 5"):
        replace(SPEC, top_k=5)
