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
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.paged_attention import (
    mosaic_gpu_decode_kernel,
    mosaic_gpu_decode_pages,
    mosaic_gpu_latent_kernel,
    mosaic_gpu_prefill,
    mosaic_gpu_rope,
)

_wgmma = plgpu.wgmma


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run in the interpreter, which must find no race."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "run_state", _run_state)
        patch.setattr(plgpu, "wgmma", _multiply)
        patch.setattr(mosaic_gpu_prefill, "store_rows", store_rows)
        patch.setattr(mosaic_gpu_rope, "turn_token", turn_token)
        patch.setattr(mosaic_gpu_decode_pages, "take", take)
        for function in DECODE:
            patch.setattr(mosaic_gpu_decode_kernel, function.__name__, function)
        for function in LATENT:
            patch.setattr(mosaic_gpu_latent_kernel, function.__name__, function)
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


def _each(first: jax.Array | int, end: jax.Array | int, f: Callable[[jax.Array], None]) -> None:
    def step(i: jax.Array, carry: None) -> None:
        f(i)

    lax.fori_loop(first, end, step, None)


def store_rows(acc: jax.Array, out: Any, base: jax.Array, first: jax.Array, count: jax.Array, *, stride: int) -> None:
    acc = acc.astype(out.dtype)

    def put(row: jax.Array) -> None:
        element = base + stride * (row - first)
        out[(*_place(out, element), pl.ds(lax.rem(element, out.shape[-1]), acc.shape[1]))] = acc[row]

    _each(first, first + count, put)


def store_row_values(x: jax.Array, out: Any, base: jax.Array, first: jax.Array, count: jax.Array) -> None:
    def put(row: jax.Array) -> None:
        out[tuple(jnp.unravel_index(base + row - first, out.shape))] = x[row]

    _each(first, first + count, put)


def arrive(counters: Any, index: jax.Array, shared: Any, slot: jax.Array) -> jax.Array:
    before: jax.Array = counters[index]
    counters[index] = before + 1
    return before


def take(counters: Any, index: int, total: jax.Array, shared: Any, slot: jax.Array) -> jax.Array:
    before: jax.Array = counters[index]
    counters[index] = jnp.where(before + 1 == total, 0, before + 1)
    return before


def merge_partials(
    parts: Any, lse: Any, counters: Any, out: Any, first: jax.Array, count: jax.Array, index: jax.Array, base: jax.Array, *,
    rows: int, stride: int,
) -> None:  # fmt: skip
    def add(s: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights = jnp.exp2(lse[first + s * stride])
        return sums[0] + weights[:, None] * parts[first + s * stride], sums[1] + weights

    total, weights = lax.fori_loop(0, count, add, (jnp.zeros(parts.shape[1:]), jnp.zeros(rows)))
    merged = (total / weights[:, None]).astype(out.dtype)
    for row in range(rows):
        out[_place(out, base + row * parts.shape[-1])] = merged[row]
    counters[index] = jnp.int32(0)


def mask_columns(x: jax.Array, first: jax.Array, most: jax.Array, *, rows: int) -> jax.Array:
    bound = jnp.minimum(first + jnp.arange(x.shape[0]) // rows, most)
    return jnp.where(jnp.arange(x.shape[1]) < bound[:, None], x, -jnp.inf)


def merge_columns(
    parts: Any, lse: Any, counters: Any, out: Any, first: jax.Array, count: jax.Array, index: jax.Array, base: jax.Array,
    half: jax.Array, *, rows: int, stride: int,
) -> None:  # fmt: skip
    dim = parts.shape[-1]
    width = dim // 2
    columns = pl.ds(half * width, width)

    def add(s: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot = first + s * stride
        weights = jnp.exp2(lse[slot, half])
        return sums[0] + weights[:, None] * parts[slot, :, columns], sums[1] + weights

    total, weights = lax.fori_loop(0, count, add, (jnp.zeros((rows, width)), jnp.zeros(rows)))
    merged = (total / weights[:, None]).astype(out.dtype)
    for row in range(rows):
        out[(*_place(out, base - half * width + row * dim), columns)] = merged[row]
    counters[index] = jnp.int32(0)


def load_tile_rows(
    source: Any, rows: Any, start: jax.Array, count: jax.Array, base: jax.Array, *, group: int, stride: int
) -> jax.Array:
    def get(i: jax.Array, tile: jax.Array) -> jax.Array:
        place = base + rows[start + i // group] * stride + i % group * source.shape[-1]
        return tile.at[i].set(source[_place(source, place)])

    return lax.fori_loop(0, count * group, get, jnp.zeros((64, source.shape[-1]), source.dtype))


def store_tile_rows(
    acc: jax.Array, out: Any, rows: Any, start: jax.Array, count: jax.Array, base: jax.Array, *, group: int, stride: int
) -> None:
    def put(i: jax.Array) -> None:
        out[_place(out, base + rows[start + i // group] * stride + i % group * out.shape[-1])] = acc[i]

    _each(0, count * group, put)


def store_tile_row_values(
    x: jax.Array, out: Any, rows: Any, start: jax.Array, count: jax.Array, base: jax.Array, *, group: int, stride: int
) -> None:
    def put(i: jax.Array) -> None:
        out[tuple(jnp.unravel_index(base + rows[start + i // group] * stride + i % group, out.shape))] = x[i]

    _each(0, count * group, put)


def arrive_for_rows(
    counters: Any, rows: Any, wanted: Any, start: jax.Array, count: jax.Array, base: jax.Array, shared: Any, slot: jax.Array, *,
    stride: int,
) -> None:  # fmt: skip
    def ask(i: jax.Array) -> None:
        row = rows[start + i]
        before = arrive(counters, base + row * stride, shared, slot)
        shared[slot + i] = (before + 1 == wanted[row]).astype(jnp.int32)

    _each(0, count, ask)


def turn_token(
    token: jax.Array, slot: jax.Array, place: jax.Array, qkv: Any, cos: Any, sin: Any, q: Any, pool: Any, scaling: Any,
    gains: Any, *, blocks: int, eps: float, offset: float,
) -> None:  # fmt: skip
    assert blocks == 1
    summed = qkv[token] if len(qkv.shape) == 4 else qkv[:, token].sum(0).astype(jnp.bfloat16)
    scaled = summed.astype(jnp.float32)
    if scaling:
        scaled *= scaling[0][token] * scaling[1][...]
    normed = scaled
    if gains:
        both = jnp.stack([gains[0][...]] * (scaled.shape[1] - 2) + [gains[1][...]] * 2).astype(jnp.float32)
        normed = scaled * lax.rsqrt(jnp.mean(scaled * scaled, axis=-1, keepdims=True) + eps) * (both + offset)
    first, second = jnp.split(normed, 2, axis=-1)
    turned = jnp.concatenate((first * cos[token] - second * sin[token], second * cos[token] + first * sin[token]), axis=-1)
    q[token] = turned[:, :-2].reshape(q.shape[1:]).astype(q.dtype)

    @pl.when(slot < pool.shape[0] * pool.shape[1])
    def _() -> None:
        both = jnp.stack((turned[:, -2], scaled[:, -1]), axis=1)
        pool[slot // pool.shape[1], slot % pool.shape[1]] = both.reshape(pool.shape[2:]).astype(pool.dtype)


def store_warp_parts(x: jax.Array, parts: Any, first: jax.Array, combine: str, vector_size: int) -> None:
    of_warps = x.reshape(-1, 4, 32 * vector_size)
    found = jnp.sum(of_warps, (0, 2)) if combine == "add" else jnp.max(of_warps, (0, 2))
    for warp in range(4):
        parts[first + warp] = found[warp]


DECODE = [
    store_rows,
    store_row_values,
    arrive,
    merge_partials,
    load_tile_rows,
    store_tile_rows,
    store_tile_row_values,
    arrive_for_rows,
]
LATENT = [store_rows, store_row_values, arrive, mask_columns, merge_columns]
