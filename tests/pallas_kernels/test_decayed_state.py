"""The step of decaying states as a kernel against plain jnp: in the interpreter, and on an NVIDIA GPU (pytest -m gpu)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers import decayed_attention
from jaxserve.models.layers.recurrence import read_states, write_states
from jaxserve.pallas_kernels import decayed_state
from jaxserve.pallas_kernels.decayed_state import advance, serves


def step_of(rows: int) -> StepBatch:
    """A decode step of rows that are in use but for the last; row 1 begins."""
    lens = jnp.full(rows, 5).at[1].set(1).at[-1].set(0)
    zeros, starts = jnp.zeros(rows, jnp.int32), jnp.minimum(jnp.arange(rows + 1), rows - 1)
    slots = jnp.arange(rows, dtype=jnp.int32).at[-1].set(2**31 - 1)
    return StepBatch(zeros, zeros, starts, lens, zeros[:, None], zeros, jnp.int32(rows - 1), slots, zeros)


def test_a_layer_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decayed_state, "advance", partial(advance, interpret=True))
    rng, rows = np.random.default_rng(0), 4
    pool, q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in [(5, 2, 16, 32), (rows, 1, 32), (rows, 1, 32), (rows, 2, 16)]
    )
    inputs = decayed_attention.Inputs(q, k, v, -jnp.abs(v[..., 0]))
    got, y = decayed_attention.run(pool, inputs, step_of(rows), Runtime("gpu", attention="mosaic_gpu"))
    want, expected = decayed_attention.run(pool, inputs, step_of(rows), Runtime("cpu"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y[:-1], expected[:-1], rtol=1e-4, atol=1e-4)


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
