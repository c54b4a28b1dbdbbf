"""The functional core in somebody else's program and mesh: the engine's tokens, and logits with a gradient."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxserve.core import Core, load_core
from jaxserve.errors import ConfigError
from jaxserve.examples import functional_core
from jaxserve.models.description import describe_decoder
from jaxserve.models.interface import Runtime
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.sharding import make_mesh
from jaxserve.step import Weights
from tests.goldens import cases
from tests.tiny import dense_logits, greedy, random_prompts, run, tiny_engine, tiny_spec, tiny_weights

PROMPTS = random_prompts(1, [5, 1, 40])
SAMPLED = SamplingParams(temperature=1.2, top_k=20, seed=4, max_tokens=20, output_kind=OutputKind.FINAL_ONLY)


def tiny_core(mesh: Mesh | None = None, window: int | None = None) -> tuple[Core, Weights]:
    model = describe_decoder("tiny", tiny_spec(window), jnp.float32)
    sizes = {"page_size": 16, "num_pages": 15, "num_slots": 4, "pages_per_slot": 5}
    return Core(model, Runtime("cpu", make_mesh(1) if mesh is None else mesh), **sizes), tiny_weights(tiny_spec(window))[1]


@pytest.mark.slow
@pytest.mark.parametrize("params", [greedy(20), SAMPLED], ids=["greedy", "sampled"])
def test_the_example_gives_the_engines_tokens(params: SamplingParams) -> None:
    """A request of the engine with the same seed; one program here, many steps there."""
    core, weights = tiny_core()
    tokens = functional_core.generate(core, weights, PROMPTS, params, max_tokens=20, seed=4)
    engine = tiny_engine()
    ids = [engine.add_request(p, params.with_(seed=4 + i)) for i, p in enumerate(PROMPTS)]
    outputs = run(engine)
    assert tokens == [outputs[i].outputs[0].token_ids for i in ids]


@pytest.mark.slow
@pytest.mark.usefixtures("quickest_compiles")
def test_a_mesh_with_other_axes(tmp_path: Path) -> None:
    """A trainer's: two replicas of data, two devices a layer."""
    folder = str(cases.write_checkpoint(tmp_path, "llama"))
    sizes = {"num_pages": 15, "num_slots": 3, "max_model_len": 64}
    results = []
    for mesh in (make_mesh(1), Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))):
        core, weights = load_core(folder, mesh, **sizes)
        assert any(not w.sharding.is_fully_replicated for w in weights) == (mesh.size > 1)
        results.append(functional_core.generate(core, weights, PROMPTS, greedy(12), max_tokens=12))
    assert results[0] == results[1]
    with pytest.raises(ConfigError, match="axes data, tensor; one of them must be 'model'"):
        load_core(folder, Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "tensor")), **sizes)


@pytest.mark.usefixtures("quickest_compiles")
@pytest.mark.parametrize("window", [None, 24])
def test_logits_of_whole_sequences(window: int | None) -> None:
    core, weights = tiny_core(window=window)
    tokens = random_prompts(2, [50, 50, 50])
    want = np.stack([dense_logits(t, window) for t in tokens])
    for own in (core, core.for_training()):
        logits = jax.jit(own.logits)(weights, jnp.asarray(tokens))
        np.testing.assert_allclose(logits, want, atol=2e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("quickest_compiles")
def test_the_gradient_is_the_slope() -> None:
    core, weights = tiny_core()
    tokens = jnp.asarray(random_prompts(3, [20, 20]))

    def loss(weights: Weights) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(core.for_training().logits(weights, tokens), axis=-1))

    direction = tuple(jnp.asarray(np.random.default_rng(i).standard_normal(w.shape), w.dtype) for i, w in enumerate(weights))
    gradient = jax.jit(jax.grad(loss))(weights)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction, strict=True))
    moved = [float(jax.jit(loss)(tuple(w + e * d for w, d in zip(weights, direction, strict=True)))) for e in (-1e-3, 1e-3)]
    assert slope == pytest.approx((moved[1] - moved[0]) / 2e-3, rel=0.02)
