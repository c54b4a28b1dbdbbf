"""All-reduce in one pass for GPUs of one process that reach each other's memory: each writes its part into the others' memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, BFloat16, Int32

from jaxserve.pallas_kernels.collectives.mosaic_gpu_exchange import (
    BLOCKS,
    FLAG_BYTES,
    MOST_DEVICES,
    THREADS,
    address_of,
    const,
    enter,
    equal,
    less,
    load_16,
    mgpu,
    plgpu,
    plus,
    store_16,
    times,
    utils,
)

UNIT = 8 * THREADS  # values that one block moves at a time: 16 bytes a thread
UNIT_BYTES = 2 * UNIT
MOST_UNITS = 16  # of a block, which keeps them in registers
SLOT_BYTES = BLOCKS * MOST_UNITS * UNIT_BYTES


def slots_end(devices: int) -> int:
    """Where this kernel's part of the lent memory ends."""
    return BLOCKS * FLAG_BYTES + 2 * devices * SLOT_BYTES


def can_sum(x: jax.Array, devices: int) -> bool:
    """Whether the kernel serves the shape: multiples of UNIT bfloat16 that fit a slot."""
    return x.dtype == jnp.bfloat16 and 0 < x.size * 2 <= SLOT_BYTES and x.size % UNIT == 0 and 1 < devices <= MOST_DEVICES


@jax.jit  # programs with many of them trace and lower it once
def all_reduce(x: BFloat16[Array, ...], table: Int32[Array, "1 entries 2"]) -> BFloat16[Array, ...]:
    """The sum over devices, added in float32 in the order of ranks, so that all of them get the same bits.

    Exchange k writes into slot k % 2 of the other devices and raises its flag there to k. Who begins the second one after it has seen
    the flags of the one between, so the others have ended exchange k, and its slot is free.

    Args:
        x: such that can_sum.
        table: of this device, see mosaic_gpu_exchange.enter; each entry is two words.
    """
    devices, units = table.shape[1] - 1, x.size // UNIT
    per_block = math.ceil(units / BLOCKS)

    def all_reduce_kernel(*refs: Any) -> None:
        def body(_: Any, x_ref: Any, table_ref: Any, y_ref: Any) -> None:
            place = enter(table_ref, devices)
            with mgpu.when(less(times(place.block, per_block), const(units))):
                _sum(place, address_of(x_ref), address_of(y_ref), devices, units, per_block)
            place.leave(1)

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)(body)(*refs)

    summed: jax.Array = plgpu.kernel(
        all_reduce_kernel,
        out_type=jax.ShapeDtypeStruct((x.size,), x.dtype),
        grid=(BLOCKS,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(),
    )(x.reshape(-1), table.reshape(-1))
    return summed.reshape(x.shape)


def _sum(place: Any, x: Any, y: Any, devices: int, units: int, per_block: int) -> None:
    """What a block does. Blocks overlap where units do not divide: they write the same bits."""
    count = place.counted(1)
    slots = slots_of(count, devices)
    first = arith.minui(times(place.block, per_block), const(units - per_block))
    offset = plus(times(first, UNIT_BYTES), times(place.thread, 16))
    x = plus(x, offset)
    mine = [load_16(x, unit * UNIT_BYTES) for unit in range(per_block)]
    for base in place.lent:
        to = plus(base, slots, times(place.rank, SLOT_BYTES), offset)
        for unit, words in enumerate(mine):
            store_16(to, words, unit * UNIT_BYTES)
    place.meet(count)
    sources = []
    for rank in range(devices):
        there = plus(place.own, slots, const(rank * SLOT_BYTES), offset)
        sources.append(arith.select(equal(place.rank, const(rank)), x, there))
    parts = [[load_16(source, unit * UNIT_BYTES) for source in sources] for unit in range(per_block)]
    for unit, of_devices in enumerate(parts):
        store_16(plus(y, offset), [pack(*add_wide(words)) for words in zip(*of_devices, strict=True)], unit * UNIT_BYTES)


def slots_of(count: Any, devices: int) -> Any:
    """Where an exchange's slots begin in lent memory, one for each rank."""
    parity = arith.andi(arith.extui(const(0).type, count), const(1))
    return plus(const(BLOCKS * FLAG_BYTES), times(parity, devices * SLOT_BYTES))


def add_wide(words: Sequence[Any]) -> tuple[Any, Any]:
    """Adds words that are each two bfloat16 numbers, in float32."""
    low, high = widen(words[0])
    for word in words[1:]:
        more_low, more_high = widen(word)
        low, high = arith.addf(low, more_low), arith.addf(high, more_high)
    return low, high


def widen(word: Any) -> tuple[Any, Any]:
    """Two bfloat16 numbers in float32, the lower half first."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    low = arith.bitcast(f32, arith.shli(word, mgpu.c(16, i32)))
    return low, arith.bitcast(f32, arith.andi(word, mgpu.c(-65536, i32)))


def pack(low: Any, high: Any) -> Any:
    """Two float32 numbers rounded to bfloat16, in a word."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=i32)
