"""The step of decaying states as a kernel against plain jnp: in the interpreter, and on an NVIDIA GPU (pytest -m gpu)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers import decayed_attention
from jaxserve.models.layers.recurrence import read_states, write_states
from jaxserve.pallas_kernels import decayed_state
from jaxserve.pallas_kernels.decayed_state import advance, serves


def step_of(lens: list[int], num_tokens: int) -> StepBatch:
    """A step of rows with so many tokens each, those with one first; row 1 begins, the last slot's row is not in use."""
    rows, ends = len(lens), np.cumsum([0, *lens])
    kv_lens = jnp.asarray([n and n + 4 * (b != 1) for b, n in enumerate(lens)])
    zeros, single = jnp.zeros(rows, jnp.int32), jnp.int32(sum(n == 1 for n in lens))
    slots = jnp.asarray([b if n else 2**31 - 1 for b, n in enumerate(lens)], jnp.int32)
    tokens = jnp.zeros(num_tokens, jnp.int32)
    return StepBatch(tokens, tokens, jnp.asarray(ends, jnp.int32), kv_lens, zeros[:, None], tokens, single, slots, zeros)


@pytest.mark.parametrize("lens", [[1, 1, 1, 0], [1, 1, 3, 0]], ids=["decode", "mixed"])
def test_a_layer_runs_it(lens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interpreted(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        calls.append(args)
        return advance(*args, interpret=True)

    monkeypatch.setattr(decayed_state, "advance", interpreted)
    rng, rows = np.random.default_rng(0), len(lens)
    num_tokens = rows if max(lens) == 1 else 8
    pool, q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in [(5, 2, 16, 32), (num_tokens, 1, 32), (num_tokens, 1, 32), (num_tokens, 2, 16)]
    )
    inputs = decayed_attention.Inputs(q, k, v, -jnp.abs(v[..., 0]))
    batch = step_of(lens, num_tokens)
    got, y = decayed_attention.run(pool, inputs, batch, Runtime("gpu", attention="mosaic_gpu"))
    want, expected = decayed_attention.run(pool, inputs, batch, Runtime("cpu"))
    assert len(calls) == 1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y[: sum(lens)], expected[: sum(lens)], rtol=1e-4, atol=1e-4)


def check(rows: int, slots: int, heads: int, groups: int, dim: int, size: int, interpret: bool) -> None:
    """Rows in any slots, one not in use, one that starts; slots of other requests stay as they are."""
    rng = np.random.default_rng(rows)
    pool, q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in [(slots, heads, dim, size), (rows, groups, size), (rows, groups, size), (rows, heads, dim)]
    )
    decay = -jnp.asarray(rng.uniform(0, 2, (rows, heads)), jnp.float32)
    place = jnp.asarray(rng.permutation(slots)[:rows], jnp.int32).at[-1].set(2**31 - 1)
    starts = jnp.arange(rows) == 1
    states, y = decayed_attention.step(read_states(pool, place, starts), decayed_attention.Inputs(q, k, v, decay))
    want = write_states(pool, states, place)
    got, out = jax.jit(advance, static_argnames="interpret")(pool, q, k, v, decay, place, starts, interpret=interpret)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[:-1], y[:-1], rtol=1e-4, atol=1e-4)


def test_in_the_interpreter() -> None:
    check(rows=3, slots=5, heads=4, groups=2, dim=32, size=512, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "dim", "size"), [(24, 1, 128, 256), (16, 2, 64, 128), (8, 8, 64, 16)])
def test_on_the_gpu(heads: int, groups: int, dim: int, size: int) -> None:
    check(20, 32, heads, groups, dim, size, interpret=False)


def test_serves() -> None:
    assert serves(jax.ShapeDtypeStruct((256, 24, 128, 256), jnp.float32))
    assert not serves(jax.ShapeDtypeStruct((256, 24, 96, 256), jnp.float32))
    assert not serves(jax.ShapeDtypeStruct((4096, 24, 128, 256), jnp.float32))
