"""What devices send each other: layers that hand over their parts give what one device gives; kernels give what XLA gives."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxserve.core import Core, Row
from jaxserve.models.description import describe_decoder
from jaxserve.models.interface import MODEL_AXIS, Runtime
from jaxserve.models.mlp_spec import MlpSpec, MoeSpec, RouterSpec
from jaxserve.models.spec import DecoderSpec
from jaxserve.pallas_kernels.collectives import all_gather, all_reduce, all_reduce_normed
from jaxserve.pallas_kernels.collectives.peers import lend
from jaxserve.sharding import make_mesh
from tests.tiny import tiny_spec, tiny_weights
from tests.tpu.steps import count_collectives

DEVICES = 2


def with_experts() -> DecoderSpec:
    spec = tiny_spec()
    expert = MlpSpec(dim=16, activation="silu")
    moe = MoeSpec(num_experts=4, top_k=2, expert=expert, router=RouterSpec(), shared=expert)
    return replace(spec, layers=(replace(spec.layers[0], mlp=moe),))


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_kept_compiled", "quickest_compiles")
@pytest.mark.parametrize("is_plain", [False, True], ids=["experts", "plain"])
def test_layers_hand_over_their_parts(is_plain: bool) -> None:
    """In float32, which the kernels do not sum: XLA does, in the same places. Plain layers add and norm in one."""
    spec = tiny_spec() if is_plain else with_experts()
    weights = tiny_weights(spec)[1]
    rows = [Row(0, 0, [5, 60, 95, 7], pages=[0, 1])]
    found = []
    for devices in (1, DEVICES):
        mesh = make_mesh(devices)
        runtime = Runtime("cpu", mesh, peer_sums=devices > 1)
        core = Core(describe_decoder("tiny", spec, jnp.float32), runtime, 16, 4, 2, 2)
        shape, state = core.shape(4, 1), core.init_state()
        if devices > 1:
            state = replace(state, peers=jnp.zeros((devices, devices + 1, 2), jnp.int32))
        compiled = (
            jax.jit(partial(core.forward, shape=shape))
            .lower(weights, state, jnp.zeros(2, jnp.int32), core.pack(rows, shape))
            .compile()
        )
        found.append(compiled(weights, state, jnp.zeros(2, jnp.int32), core.pack(rows, shape))[1].logits)
        # Sums of embeddings, attention, and experts with the shared one, which are sent together. Weights are whole: XLA adds nothing.
        wanted = {} if devices == 1 else {"all-reduce": 1 + 2 * len(spec.layers), "all-gather": 1}
        assert count_collectives(compiled.as_text()) == wanted
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs two GPUs")
@pytest.mark.parametrize("shape", [(16, 4096), (64, 4096), (256, 4096), (16, 2880), (67, 1024), (1024,)])
def test_the_kernel_sums_on_gpus(shape: tuple[int, ...]) -> None:
    """Twenty sums in a row, of which each has the one before in it: a slot that is written too early would show."""
    mesh = make_mesh(DEVICES)
    lent, table = lend(mesh)
    x = jax.random.normal(jax.random.key(1), (DEVICES, *shape), jnp.bfloat16)

    def sums(x: jax.Array, table: jax.Array, *, by_kernel: bool) -> jax.Array:
        total = own = x[0]
        for _ in range(20):
            total = all_reduce(own + total / 2, table if by_kernel else None, MODEL_AXIS)
        return total

    specs = {"mesh": mesh, "in_specs": (P(MODEL_AXIS), P(MODEL_AXIS)), "out_specs": P(), "check_vma": False}
    want = jax.jit(jax.shard_map(partial(sums, by_kernel=False), **specs))(x, table)
    program = jax.jit(jax.shard_map(partial(sums, by_kernel=True), **specs))
    for _ in range(20):
        got = program(x, table)
        first, *others = (np.asarray(shard.data) for shard in got.addressable_shards)
        wanted = np.asarray(want.addressable_shards[0].data, np.float32)
        np.testing.assert_allclose(np.asarray(first, np.float32), wanted, rtol=2e-2, atol=2e-2)
        for other in others:
            np.testing.assert_array_equal(first, other)
    del lent


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs two GPUs")
@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (64, 4096), (256, 4096), (100, 1024), (64, 8192)])
@pytest.mark.parametrize("count", [1, 8])
def test_the_kernel_sums_and_norms_on_gpus(shape: tuple[int, int], count: int) -> None:
    """Ten in a row, each of the one before, with fewer rows between them and other kernels' sums, which share slots and flags."""
    mesh = make_mesh(DEVICES)
    lent, table = lend(mesh)
    x = jax.random.normal(jax.random.key(1), (DEVICES, *shape), jnp.bfloat16)
    gain = jax.random.normal(jax.random.key(2), shape[1:], jnp.bfloat16)

    def parts_of(x: jax.Array) -> jax.Array:
        """Float32 numbers that are all different and add up to x; x itself where there is one part."""
        wide = x.astype(jnp.float32)
        parts = [wide * 2.0 ** -(1 + i) for i in range(count - 1)]
        return x[None] if count == 1 else jnp.stack([*parts, wide - sum(parts)])

    def sums(x: jax.Array, table: jax.Array, *, by_kernel: bool) -> tuple[jax.Array, ...]:
        peers = table if by_kernel else None
        total = normed = jnp.zeros_like(x[0])
        how: Any = {"eps": 1e-5, "offset": 1.0}
        for _ in range(10):
            total, normed = all_reduce_normed(parts_of(x[0] + normed), total / 2, gain, peers, MODEL_AXIS, **how)
            normed += all_reduce(jnp.ones((16, 1024), jnp.bfloat16), peers, MODEL_AXIS)[0, 0]
            few = x[:, :3, :1024] * (jnp.arange(1024) % 4 > 1)  # many words are 0
            others = all_reduce_normed(few, jnp.zeros_like(few[0]), gain[:1024], peers, MODEL_AXIS, **how)
            normed = normed.at[: few.shape[1], :1024].add(others[1])
        return total, normed

    specs = {"mesh": mesh, "in_specs": (P(MODEL_AXIS), P(MODEL_AXIS)), "out_specs": P(), "check_vma": False}
    want = jax.jit(jax.shard_map(partial(sums, by_kernel=False), **specs))(x, table)
    program = jax.jit(jax.shard_map(partial(sums, by_kernel=True), **specs))
    for _ in range(20):
        for got, wanted in zip(program(x, table), want, strict=True):
            first, *others = (np.asarray(shard.data) for shard in got.addressable_shards)
            wide = np.asarray(wanted.addressable_shards[0].data, np.float32)
            apart = np.abs(np.asarray(first, np.float32) - wide)  # roundings go through ten norms
            assert apart.mean() < 0.01 * np.abs(wide).mean() and apart.max() < 0.1 * np.abs(wide).max()
            for other in others:
                np.testing.assert_array_equal(first, other)
    del lent


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs two GPUs")
@pytest.mark.parametrize("shape", [(1, 64_128), (16, 64_128), (64, 64_128), (256, 64_128), (33, 4_100)])
def test_the_kernel_gathers_on_gpus(shape: tuple[int, int]) -> None:
    """Three in a row, each of what the one before gave, with a sum between, which shares the flags."""
    mesh = make_mesh(DEVICES)
    lent, table = lend(mesh, math.prod(shape) * DEVICES * 4)
    x = jax.random.normal(jax.random.key(2), (shape[0], DEVICES * shape[1]))

    def gathers(x: jax.Array, table: jax.Array, *, by_kernel: bool) -> jax.Array:
        peers = table if by_kernel else None
        found = all_gather(x, peers, MODEL_AXIS)
        for _ in range(2):
            ones = all_reduce(jnp.ones((16, 1024), jnp.bfloat16), peers, MODEL_AXIS)
            found = all_gather(found[:, : shape[1]] * ones[0, 0] + x, peers, MODEL_AXIS)
        return found

    specs = {"mesh": mesh, "in_specs": (P(None, MODEL_AXIS), P(MODEL_AXIS)), "out_specs": P(), "check_vma": False}
    want = np.asarray(jax.jit(jax.shard_map(partial(gathers, by_kernel=False), **specs))(x, table))
    program = jax.jit(jax.shard_map(partial(gathers, by_kernel=True), **specs))
    for _ in range(10):
        for shard in program(x, table).addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), want)
    del lent
