"""Rows by group: their layout, and the GPU kernel's numbers, in the interpreter here and on an NVIDIA GPU (pytest -m gpu)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.grouped_matmul import Groups, choose_block, group_rows, grouped_matmul, mosaic_gpu


@pytest.mark.parametrize("block", [1, 8, 64])
@pytest.mark.parametrize("num_items", [1, 300, 1500])
def test_every_block_is_of_one_group(num_items: int, block: int) -> None:
    rng, num_groups = np.random.default_rng(block), 5
    group = rng.integers(-2, num_groups + 2, num_items)  # some are of none
    group[group == 3] = 2  # and a group has none
    groups = jax.jit(group_rows, static_argnums=(1, 2))(jnp.asarray(group), num_groups, block)
    place, used = np.asarray(groups.place), (group >= 0) & (group < num_groups)
    assert len(set(place[used])) == used.sum() and (place[~used] == groups.source.shape[0]).all()
    assert (np.asarray(groups.source)[place[used]] == np.flatnonzero(used)).all()
    assert (np.asarray(groups.of_row)[place[used]] == group[used]).all()
    assert int(groups.sizes.sum()) == int(groups.num_blocks[0]) * block > place[used].max(initial=-1)
    ends = np.repeat(np.arange(num_groups), np.asarray(groups.sizes))
    assert (np.asarray(groups.of_row)[: len(ends)] == ends).all()


def case(num_items: int, num_groups: int, depth: int, cols: int, block: int) -> tuple[jax.Array, jax.Array, Groups, Any]:
    """Rows, matrices, their groups, and the product of each item in float32."""
    rng = np.random.default_rng([num_items, num_groups, depth, cols])
    chances = rng.dirichlet(np.full(num_groups, 0.5))
    group = jnp.asarray(rng.choice(num_groups, num_items, p=chances))
    x = jnp.asarray(rng.standard_normal((num_items, depth)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((num_groups, depth, cols)), jnp.bfloat16)
    groups = group_rows(group, num_groups, block)
    every = jnp.einsum("nk,gkm->gnm", x, w, preferred_element_type=jnp.float32)
    return x[groups.source], w, groups, every[group, jnp.arange(num_items)]


def assert_equal_but_for_rounding(out: jax.Array, want: jax.Array) -> None:
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(want), rtol=1e-2, atol=1e-2 * float(jnp.std(want)))


@pytest.mark.slow
@pytest.mark.parametrize(("block", "cols", "stages"), [(8, 64, 3), (64, 192, 2), (128, 64, 4)])
def test_kernel_in_the_interpreter(block: int, cols: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "CTAS", 2)
    x, w, groups, want = case(200, 3, 192, 192, block)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = mosaic_gpu.grouped_matmul(x, w, groups.block_groups, groups.num_blocks, mosaic_gpu.Config(cols, stages))
    assert_equal_but_for_rounding(out[groups.place], want)


@pytest.mark.gpu
@pytest.mark.parametrize("num_items", [1, 8, 100, 4096])
@pytest.mark.parametrize(("num_groups", "depth", "cols"), [(128, 2048, 1536), (64, 1408, 2048), (32, 2880, 5760), (4, 64, 64)])
def test_kernel_on_the_gpu(num_items: int, num_groups: int, depth: int, cols: int) -> None:
    block = choose_block(num_items, num_groups, "mosaic_gpu")
    x, w, groups, want = case(num_items, num_groups, depth, cols, block)
    out = jax.jit(lambda: grouped_matmul(x, w, groups, "mosaic_gpu"))()
    assert_equal_but_for_rounding(out[groups.place], want)
