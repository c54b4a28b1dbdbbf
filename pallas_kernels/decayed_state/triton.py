"""The step as a Triton kernel: a program reads part of a head's state, writes it back where it was, and sums up its part of y."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

NUMBERS = 8192  # of the state that a program holds in registers: 64 a thread


def advance(
    pool: Float[Array, "slots heads P N"],
    q: Float[Array, "B groups N"],
    k: Float[Array, "B groups N"],
    v: Float[Array, "B heads P"],
    decay: Float[Array, "B heads"],
    slots: Int[Array, " B"],
    starts: Bool[Array, " B"],
    interpret: bool,
) -> tuple[Array, Array]:
    """See api.advance."""
    num_slots, heads, dim, size = pool.shape
    rows, groups = q.shape[:2]
    part = min(dim, NUMBERS // size)

    def step(old: Any, q: Any, k: Any, v: Any, decay: Any, slots: Any, starts: Any, new: Any, y: Any) -> None:
        row, head, at = pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * part, part)
        slot, group = slots[row], head // (heads // groups)

        @pl.when(slot < num_slots)
        def _() -> None:
            state = jnp.where(starts[row] != 0, 0.0, old[slot, head, at, :])
            state = state * jnp.exp(decay[row, head]) + v[row, head, at][:, None] * k[row, group, :][None]
            new[slot, head, at, :] = state
            y[row, head, at] = jnp.sum(state * q[row, group, :][None], axis=1)

    whole = pl.BlockSpec(memory_space=pl.ANY)
    advanced, out = pl.pallas_call(
        step,
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype), jax.ShapeDtypeStruct(v.shape, jnp.float32)],
        grid=(rows, heads, dim // part),
        in_specs=[whole] * 7,
        out_specs=[whole] * 2,
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decayed_state",
    )(pool, q, k, v, decay, slots, starts.astype(jnp.int32))
    return advanced, out
