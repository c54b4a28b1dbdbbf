"""Runs the GPU attention kernels in Pallas' GPU interpreter: stand-ins for what it lacks, written in Pallas.

It knows neither wgmma with an operand or a first value in registers, nor code for Mosaic's registers (mosaic_gpu_registers.py). So
what is tested here is all of a kernel but those few functions. No stand-in is atomic: one compute warpgroup where results are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_prefill

_wgmma = plgpu.wgmma


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run in the interpreter, which must find no race."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "run_state", _run_state)
        patch.setattr(plgpu, "wgmma", _multiply)
        patch.setattr(mosaic_gpu_prefill, "store_rows", store_rows)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        assert not gpu_callbacks.get_races().races_found


class _Accumulator:
    def __init__(self, value: jax.Array) -> None:
        self.value = value


def _run_state(f: Callable[[Any], None]) -> Callable[[Any], jax.Array]:
    def run(init: Any) -> jax.Array:
        acc = _Accumulator(init._init)
        f(acc)
        return acc.value

    return run


def _multiply(acc: Any, a: Any, b: Any) -> None:
    if not isinstance(acc, _Accumulator):
        _wgmma(acc, a, b)
        return
    acc.value += jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")
    plgpu.commit_smem()  # wgmma, in whose place this is, reads as bulk copies write


def _place(ref: Any, element: jax.Array) -> tuple[jax.Array, ...]:
    """The index of the row that begins at an element."""
    return tuple(jnp.unravel_index(element // ref.shape[-1], ref.shape[:-1]))


def store_rows(acc: jax.Array, out: Any, base: jax.Array, first: jax.Array, count: jax.Array, *, stride: int) -> None:
    acc = acc.astype(out.dtype)

    def put(row: jax.Array, carry: None) -> None:
        out[_place(out, base + stride * (row - first))] = acc[row]

    jax.lax.fori_loop(first, first + count, put, None)
