"""Whole steps compile for every chip: kernels are used, nothing copies the pool, and devices talk as often as they must."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

from tests.tpu.steps import CHIPS, SMALL, check_step, compile_step, count_collectives, plan, write_config
from tests.tpu.test_target import needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.slow, pytest.mark.usefixtures("no_compile_cache")]

SIZES = {"max_num_batched_tokens": 256, "max_num_seqs": 16}


@pytest.mark.parametrize(
    ("target", "step", "layers"),
    [*((chip, step, 4) for chip in CHIPS for step in ("decode 16", "forward 256")), ("tpu:v6e:2x2", "decode 16", 32)],
)
def test_on_four_devices(target: str, step: str, layers: int, tmp_path: Path) -> None:
    """Sums after each half of a layer and after the embedding; the logits are put together once.

    A mixed step has both kernels. One that occurs in every layer is compiled once, so depth costs little.
    """
    build = plan(write_config(tmp_path, num_hidden_layers=layers), target, 4, **SIZES)
    compiled = compile_step(build, step)
    check_step(build, compiled)
    collectives = count_collectives(compiled.as_text())
    assert collectives.pop("all-gather") == 1
    assert sum(collectives.values()) == 2 * layers + 1, collectives


@pytest.mark.tpu
@pytest.mark.parametrize("step", ["decode 16", "forward 256"])
@pytest.mark.parametrize("target", CHIPS)
def test_four_layers_on_one_device(target: str, step: str, tmp_path: Path) -> None:
    build = plan(write_config(tmp_path), target, **SIZES)
    compiled = compile_step(build, step)
    check_step(build, compiled)
    assert not count_collectives(compiled.as_text())


@pytest.mark.tpu
@pytest.mark.parametrize("target", CHIPS)
def test_weights_and_pages_of_8_bits(target: str, tmp_path: Path) -> None:
    """No matrix is widened in the device's memory."""
    build = plan(write_config(tmp_path), target, quantization="fp8", kv_cache_dtype="fp8", **SIZES)
    compiled = compile_step(build, "decode 16")
    check_step(build, compiled)
    assert {cache.dtype for cache in build.inputs().state.caches} == {jnp.dtype(jnp.float8_e4m3fn)}
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * SMALL["hidden_size"] * SMALL["intermediate_size"]
