"""A whole prompt in one chunk, in other types and on other meshes. tests/test_goldens.py has every family."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.interface import Runtime
from jaxserve.sharding import Shardings, kv_repeat, make_mesh
from tests.goldens import cases
from tests.models.forward import empty_caches, forward, logit_error, open_and_load, prompts_batch


@pytest.mark.slow
def test_bfloat16_stays_close(tmp_path: Path) -> None:
    model, weights = open_and_load(cases.write_checkpoint(tmp_path, "gemma3_text"), dtype=jnp.bfloat16)
    assert {w.dtype for w in weights} == {jnp.dtype("bfloat16")}
    tokens, wanted = cases.read_golden("gemma3_text")
    logits = forward(model, weights, tokens)
    assert logits.dtype == np.float32
    assert np.abs(logits - wanted).mean() < 0.1 * wanted.std()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "qwen2", "llama_bias"])
def test_repeated_kv_heads_change_nothing(case: str, tmp_path: Path) -> None:
    """As under tensor parallelism with more devices than kv heads."""
    folder = cases.write_checkpoint(tmp_path, case)
    tokens, wanted = cases.read_golden(case)
    plain, _ = open_and_load(folder)
    model, weights = open_and_load(folder, kv_repeat=2)
    assert [s.num_kv_heads for s in model.cache_specs] == [2 * s.num_kv_heads for s in plain.cache_specs]
    assert logit_error(forward(model, weights, tokens), wanted) < 0.01


def test_only_the_wanted_rows_get_logits(tmp_path: Path) -> None:
    model, weights = open_and_load(cases.write_checkpoint(tmp_path, "mistral"))
    tokens, wanted = cases.read_golden("mistral")
    logits = forward(model, weights, tokens, logit_rows=[47, 3, 95])
    assert logits.shape == (3, 160)
    assert logit_error(logits, wanted.reshape(-1, 160)[[47, 3, 95]]) < 0.01


def test_one_rotation_for_each_distinct_rope(tmp_path: Path) -> None:
    """Angles are computed once a step, not once a layer: Gemma 3 has seven layers and two ropes."""
    model, weights = open_and_load(cases.write_checkpoint(tmp_path, "gemma3_text"))
    batch, num_pages = prompts_batch(cases.read_golden("gemma3_text")[0])
    run = partial(model.apply, runtime=Runtime("cpu"))
    assert str(jax.make_jaxpr(run)(weights, batch, empty_caches(model, num_pages, 1))).count(" cos ") == 2


MORE = [pytest.param(*case, marks=pytest.mark.extra) for case in (("llama", 4), ("gemma3_text", 2))]


@pytest.mark.slow
@pytest.mark.parametrize("case, num_devices", [("llama", 2), ("gemma3_text", 4), *MORE])
def test_tensor_parallel(case: str, num_devices: int, tmp_path: Path) -> None:
    """Two kv heads over two and four devices: cut, and repeated."""
    mesh = make_mesh(num_devices)
    folder = cases.write_checkpoint(tmp_path, case)
    model, weights = open_and_load(folder, kv_repeat=kv_repeat(2, num_devices), sharding_for=Shardings(mesh).of)
    qkv = weights[[p.path for p in model.parameters].index("layers.0.mixer.qkv")]
    assert qkv.addressable_shards[0].data.shape[1] == 1
    tokens, wanted = cases.read_golden(case)
    assert logit_error(forward(model, weights, tokens, runtime=Runtime("cpu", mesh)), wanted) < 0.01
