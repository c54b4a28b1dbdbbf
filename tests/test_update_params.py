"""Other weights in a running engine: which trees are taken, where the arrays lie, and whose tokens come from which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve import LLM
from jaxserve.engine import Engine
from jaxserve.errors import WeightsError
from jaxserve.models.decoder import abstract_decoder
from jaxserve.models.interface import MODEL_AXIS
from jaxserve.replicas import Replicas
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.sharding import Shardings, make_mesh
from jaxserve.weight_store import WeightStore
from tests.tiny import greedy, random_prompts, run, tiny_engine, tiny_spec

Tree = dict[str, Any]


def other(params: Tree, seed: int = 1) -> Tree:
    """Different weights of the same form."""
    rng = np.random.default_rng(seed)
    return {name: jax.device_put(x + rng.normal(0, 0.3, x.shape).astype(x.dtype), x.sharding) for name, x in params.items()}


def pointers(params: Tree) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for x in params.values() for shard in x.addressable_shards]


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    request_id = engine.add_request(prompt, params)
    return run(engine)[request_id].outputs[0].token_ids


def test_arrays_are_taken_without_a_copy() -> None:
    engine = tiny_engine()
    tree = other(engine.params)
    before = pointers(tree)
    assert engine.update_params(tree) == 1
    assert pointers(engine.params) == before
    alone(engine, [1, 2, 3], greedy(5))
    assert pointers(engine.params) == before
    engine.shutdown()
    assert not any(x.is_deleted() for x in tree.values())


def test_shards_are_taken_without_a_copy() -> None:
    """On four devices; an array that lies otherwise is moved."""
    shardings = Shardings(make_mesh(4))
    cut, whole = NamedSharding(shardings.mesh, PartitionSpec(None, MODEL_AXIS)), shardings.replicated
    abstract = [jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=cut), jax.ShapeDtypeStruct((3,), jnp.float32, sharding=whole)]
    store = WeightStore(["a", "b"], abstract, ())
    tree = {"a": jax.device_put(jnp.ones((4, 8)), cut), "b": jax.device_put(jnp.ones(3), whole)}
    assert store.replace(store.place(tree)) == 1
    assert pointers(store.tree) == pointers(tree)
    moved = store.place(tree | {"a": jnp.arange(32.0).reshape(4, 8)})
    assert moved[0].sharding == cut and moved[1].sharding == whole
    np.testing.assert_array_equal(moved[0], np.arange(32).reshape(4, 8))


@pytest.mark.parametrize("form", ["by name", "nested", "nnx.State", "numpy", "another sharding"])
def test_forms_of_the_tree(form: str) -> None:
    engine = tiny_engine()
    tree = other(engine.params)
    _, state = nnx.split(abstract_decoder(tiny_spec(), jnp.float32))
    nested = jax.tree.unflatten(jax.tree.structure(state), list(tree.values()))
    given = {
        "by name": dict(reversed(tree.items())),
        "nested": nnx.to_pure_dict(nested),
        "nnx.State": nested,
        "numpy": {name: np.asarray(x) for name, x in tree.items()},
        "another sharding": jax.device_put(tree, SingleDeviceSharding(jax.devices()[1])),
    }[form]
    engine.update_params(given)
    for name, x in engine.params.items():
        np.testing.assert_array_equal(x, tree[name])


def deleted(array: jax.Array) -> jax.Array:
    copy = jnp.array(array, copy=True)
    copy.delete()
    return copy


WRONG: dict[str, tuple[Callable[[Tree], Any], str]] = {
    "missing": (lambda params: {n: x for n, x in params.items() if n != "embed"}, "lack embed;"),
    "unknown": (
        lambda params: params | {"more": params["embed"]},
        "hold unknown more; give what `params` holds: 15 arrays by name",
    ),
    "both": (
        lambda params: {f"x{n}": x for n, x in params.items()},
        "lack embed, final_norm.weight, layers.0.* and 12 more and hold unknown",
    ),
    "shape": (lambda params: params | {"embed": params["embed"][:-1]}, r"embed is float32\[95, 32\], not float32\[96, 32\]"),
    "dtype": (
        lambda params: params | {"embed": params["embed"].astype(jnp.bfloat16)},
        r"embed is bfloat16\[96, 32\], not float32",
    ),
    "no array": (lambda params: params | {"embed": 1.0}, "embed is a float, not an array"),
    "deleted": (lambda params: params | {"embed": deleted(params["embed"])}, "embed is deleted"),
    "twice": (lambda params: params | {"layers": {"0.mixer.qkv": params["embed"]}}, "hold layers.0.mixer.qkv twice"),
    "nothing": (lambda params: None, "lack"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tree_changes_nothing(kind: str) -> None:
    engine = tiny_engine()
    make, text = WRONG[kind]
    tree = make(engine.params)
    prompt = random_prompts(1, [40])[0]
    want = alone(engine, prompt, greedy(20))
    request_id = engine.add_request(prompt, greedy(20))
    for _ in range(4):
        engine.step()
    before = pointers(engine.params)
    with pytest.raises(WeightsError, match=text):
        engine.update_params(tree)
    output = run(engine)[request_id]
    assert output.outputs[0].token_ids == want and output.num_cached_tokens == 32
    assert (output.weight_version, output.first_weight_version) == (0, 0)
    assert pointers(engine.params) == before


def test_nothing_of_the_old_weights_is_found() -> None:
    """Neither in the prefix cache, nor in the pages of requests that run on."""
    prompt = random_prompts(2, [70])[0]
    params = SamplingParams(seed=7, max_tokens=20, output_kind=OutputKind.FINAL_ONLY)
    engine = tiny_engine()
    first = engine.params
    old = alone(engine, prompt, params)
    engine.update_params(second := other(first))
    request_id = engine.add_request(prompt, params)
    output = run(engine)[request_id]
    assert output.num_cached_tokens == 0 and output.outputs[0].token_ids != old
    fresh = tiny_engine()
    fresh.update_params(second)
    assert alone(fresh, prompt, params) == output.outputs[0].token_ids
    engine.update_params(first)
    assert alone(engine, prompt, params) == old


def test_a_request_that_runs_on_is_the_new_policys() -> None:
    """Its later tokens are those that the new weights give after the earlier ones."""
    engine = tiny_engine()
    second = other(engine.params)
    prompt = random_prompts(3, [37])[0]
    request_id = engine.add_request(prompt, greedy(30))
    neighbours = [engine.add_request(p, greedy(25, n=2)) for p in random_prompts(4, [20, 50])]
    for _ in range(12):
        engine.step()
    engine.update_params(second)
    outputs = run(engine)
    output = outputs[request_id]
    assert (output.first_weight_version, output.weight_version) == (0, 1)
    assert all(outputs[n].weight_version == 1 for n in neighbours)
    tokens = output.outputs[0].token_ids
    old, new = tiny_engine(), tiny_engine()
    new.update_params(second)
    before = alone(old, prompt, greedy(30))
    assert tokens != before
    splits = [n for n in range(5, 30) if tokens[:n] == before[:n]]  # one of them is where the weights changed
    assert any(alone(new, prompt + tokens[:n], greedy(30 - n)) == tokens[n:] for n in splits)


def test_versions_on_outputs() -> None:
    engine = tiny_engine()
    tree = engine.params
    ids = [engine.add_request([1, 2, 3], greedy(4)) for _ in range(2)]
    assert {o.weight_version for o in run(engine).values()} == {0}
    for version in (1, 2):
        assert engine.update_params(tree) == version
        ids = [engine.add_request([1, 2, i], greedy(4)) for i in range(3)]
        outputs = run(engine)
        assert [(outputs[i].first_weight_version, outputs[i].weight_version) for i in ids] == [(version, version)] * 3


def test_llm_and_replicas() -> None:
    prompt = {"prompt_token_ids": random_prompts(5, [20])[0]}
    single = LLM.from_engine(tiny_engine())
    several = LLM.from_engine(Replicas([tiny_engine() for _ in range(2)]))
    tree = other(single.params)
    results = []
    for llm in (single, several):
        with pytest.raises(WeightsError):
            llm.update_params({})
        assert llm.update_params(tree) == 1
        outputs = llm.generate([prompt] * 4, greedy(10), use_tqdm=False)
        assert {o.weight_version for o in outputs} == {1}
        results.append([o.outputs[0].token_ids for o in outputs])
    assert results[0] == results[1]
