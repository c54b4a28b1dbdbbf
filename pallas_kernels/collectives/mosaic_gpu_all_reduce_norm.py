"""All-reduce, the residual stream and an RMS norm in one kernel, which meanwhile asks for the weights that are read next.

A thread block has whole rows, so it can norm what it has added up. Exchanges, slots and flags are those of mosaic_gpu_all_reduce.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, BFloat16, Int32

from jaxserve.pallas_kernels.collectives.mosaic_gpu_all_reduce import (
    MOST_UNITS,
    SLOT_BYTES,
    UNIT,
    UNIT_BYTES,
    add_wide,
    pack,
    slots_of,
    widen,
)
from jaxserve.pallas_kernels.collectives.mosaic_gpu_exchange import (
    BLOCKS,
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

AT_ONCE = 40  # loads of 16 bytes that a thread has under way at most: they are in registers
WARPS = THREADS // 32
PREFETCHED_BYTES = 16 << 20  # of the next weights; a third of the second-level cache, which may hold each line twice
STRETCHES = 16  # of the weights, of each of which the beginning is fetched: blocks of a split product begin all over them
Words = Sequence[Any]


def can_norm(x: jax.Array, devices: int) -> bool:
    """Whether the kernel serves the shape: bfloat16 rows of whole units, few enough of them for a slot."""
    rows, width = x.shape
    units = width // UNIT
    is_whole = x.dtype == jnp.bfloat16 and width % UNIT == 0 and 0 < math.ceil(rows / BLOCKS) * units <= MOST_UNITS
    return is_whole and x.size * 2 <= SLOT_BYTES and 1 < devices <= MOST_DEVICES and (devices + 1) * units <= AT_ONCE


@functools.partial(jax.jit, static_argnames=("eps", "offset"))
def all_reduce_normed(
    x: BFloat16[Array, "T D"],
    residual: BFloat16[Array, "T D"],
    gain: BFloat16[Array, " D"],
    table: Int32[Array, "1 entries 2"],
    next_weights: Array | None = None,
    *,
    eps: float,
    offset: float,
) -> tuple[BFloat16[Array, "T D"], BFloat16[Array, "T D"]]:
    """residual plus the sum of x over devices, and the RMS norm of that times (gain + offset).

    Both sums are added in float32, x in the order of ranks, and rounded once, so that all devices get the same bits; the norm is of
    the rounded sum.

    Args:
        x: such that can_norm.
        table: as all_reduce's.
        next_weights: what will be read soon, of which some is fetched into the cache.
    """
    devices, (rows, width) = table.shape[1] - 1, x.shape
    arrays = [x, residual, gain, table.reshape(-1), *([] if next_weights is None else [next_weights])]

    def all_reduce_norm_kernel(*refs: Any) -> None:
        def body(_: Any, *refs: Any) -> None:
            x, residual, gain, table, *weights, total, normed, shared = refs
            place = enter(table, devices)
            for ref in weights:
                assert next_weights is not None
                _prefetch(place, address_of(ref), next_weights.nbytes)
            with mgpu.when(less(place.block, const(rows))):
                team = _Team(place, rows, width, devices)
                words = team.add(address_of(x), address_of(residual), address_of(total))
                team.norm(words, address_of(gain), address_of(normed), shared, eps, offset)
            place.leave(1)

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(body)(*refs)

    result: tuple[Array, Array] = plgpu.kernel(
        all_reduce_norm_kernel,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2,
        grid=(BLOCKS,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((MOST_UNITS * WARPS,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(),
    )(*arrays)
    return result


class _Team:
    """A thread block and its rows: its own number, and each BLOCKS further. Past the last row it does that again: the same bits."""

    def __init__(self, place: Any, rows: int, width: int, devices: int) -> None:
        self.place, self.width, self.devices = place, width, devices
        self.units = width // UNIT
        own = [plus(place.block, const(i * BLOCKS)) for i in range(math.ceil(rows / BLOCKS))]
        column = times(place.thread, 16)
        self.offsets = [plus(times(arith.minui(row, const(rows - 1)), 2 * width), column) for row in own]
        self.column = column

    def add(self, x: Any, residual: Any, total: Any) -> list[list[Words]]:
        """Stores residual plus all devices' x to total; also gives it, by row and unit, as pairs of bfloat16."""
        place = self.place
        count = place.counted(1)
        slots = slots_of(count, self.devices)
        mine = [self._load(plus(x, offset)) for offset in self.offsets]
        for base in place.lent:
            to = plus(base, slots, times(place.rank, SLOT_BYTES))
            for offset, row in zip(self.offsets, mine, strict=True):
                self._store(plus(to, offset), row)
        place.meet(count)
        sources = []
        for rank in range(self.devices):
            there = plus(place.own, slots, const(rank * SLOT_BYTES))
            sources.append(arith.select(equal(place.rank, const(rank)), x, there))
        sums: list[list[Words]] = []
        at_once = max(1, AT_ONCE // ((self.devices + 1) * self.units))
        for first in range(0, len(self.offsets), at_once):
            offsets = self.offsets[first : first + at_once]
            loaded = [[self._load(plus(source, offset)) for source in (*sources, residual)] for offset in offsets]
            for offset, parts in zip(offsets, loaded, strict=True):
                by_unit = zip(*parts, strict=True)
                sums.append([[pack(*add_wide(words)) for words in zip(*of_unit, strict=True)] for of_unit in by_unit])
                self._store(plus(total, offset), sums[-1])
        return sums

    def norm(self, rows: list[list[Words]], gain: Any, normed: Any, shared: Any, eps: float, offset: float) -> None:
        """Stores the norm of each row."""
        gains = self._load(plus(gain, self.column))
        f32 = ir.F32Type.get()
        squares = self._over_block([_sum_of_squares(row) for row in rows], shared)
        for at, row, square in zip(self.offsets, rows, squares, strict=True):
            mean = arith.addf(arith.mulf(square, mgpu.c(1 / self.width, f32)), mgpu.c(eps, f32))
            scale = utils.inline_ptx("rsqrt.approx.f32 $0, $1;", mean, result_types=f32)

            def applied(word: Any, gain: Any, scale: Any = scale) -> Any:
                pairs = zip(widen(word), widen(gain), strict=True)
                return pack(*(arith.mulf(arith.mulf(x, scale), arith.addf(g, mgpu.c(offset, f32))) for x, g in pairs))

            both = zip(row, gains, strict=True)
            self._store(plus(normed, at), [[applied(*pair) for pair in zip(*words, strict=True)] for words in both])

    def _load(self, address: Any) -> list[Words]:
        return [load_16(address, unit * UNIT_BYTES) for unit in range(self.units)]

    def _store(self, address: Any, row: Sequence[Words]) -> None:
        for unit, words in enumerate(row):
            store_16(address, words, unit * UNIT_BYTES)

    def _over_block(self, numbers: list[Any], shared: Any) -> list[Any]:
        """Each number's sum over all threads, in an order that is always the same."""
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        thread, base = arith.trunci(i32, self.place.thread), utils.memref_ptr(shared)
        warp, lane = arith.divui(thread, mgpu.c(32, i32)), arith.remui(thread, mgpu.c(32, i32))
        for i, number in enumerate(numbers):
            for distance in (16, 8, 4, 2, 1):
                number = arith.addf(number, utils.shfl_bfly(number, distance))
            with mgpu.when(equal(lane, mgpu.c(0, i32))):
                at = utils.getelementptr(base, [arith.addi(warp, mgpu.c(i * WARPS, i32))], f32)
                llvm.store(number, at, volatile_=True)
        mgpu.warpgroup_barrier()
        parts = [
            [llvm.load(f32, utils.getelementptr(base, [i * WARPS + other], f32), volatile_=True) for other in range(WARPS)]
            for i in range(len(numbers))
        ]
        return [functools.reduce(arith.addf, of_row) for of_row in parts]


def _sum_of_squares(row: Sequence[Words]) -> Any:
    numbers = [number for words in row for word in words for number in widen(word)]
    return functools.reduce(arith.addf, (arith.mulf(number, number) for number in numbers))


def _prefetch(place: Any, weights: Any, size: int) -> None:
    """Asks for the beginning of each stretch of the weights; nobody waits for it. By a warp that raises no flags."""
    piece = min(PREFETCHED_BYTES, size) // (STRETCHES * BLOCKS) // 16 * 16
    i32 = ir.IntegerType.get_signless(32)
    if piece:
        first = plus(weights, times(place.block, piece))
        for stretch in range(STRETCHES):
            at = plus(first, const(size // STRETCHES // 16 * 16 * stretch))
            is_asking = equal(place.thread, const(THREADS - 32))
            ptx = "cp.async.bulk.prefetch.L2.global [$0], $1;"
            utils.inline_ptx(ptx, at, mgpu.c(piece, i32), predicate=is_asking, has_side_effects=True)
