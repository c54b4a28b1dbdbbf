"""Products in parts, all-reduce, the residual stream and an RMS norm in one kernel.

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
from jaxtyping import Array, BFloat16, Float, Int32

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
Words = Sequence[Any]


def can_norm(parts: jax.Array, residual: jax.Array, devices: int) -> bool:
    """Whether the kernel serves the shapes: bfloat16 rows of whole units, few enough of them for a slot; few parts in float32, or one."""
    (rows, width), count, is_wide = residual.shape, parts.shape[0], parts.dtype == jnp.float32
    units = width // UNIT
    is_whole = residual.dtype == jnp.bfloat16 and width % UNIT == 0 and 0 < math.ceil(rows / BLOCKS) * units <= MOST_UNITS
    is_read = 2 * count <= AT_ONCE if is_wide else count == 1 and parts.dtype == jnp.bfloat16
    fits = residual.size * 2 <= SLOT_BYTES and (devices + 1) * units <= AT_ONCE
    return is_whole and is_read and fits and 1 < devices <= MOST_DEVICES


@functools.partial(jax.jit, static_argnames=("eps", "offset"))
def all_reduce_normed(
    parts: Float[Array, "S T D"],
    residual: BFloat16[Array, "T D"],
    gain: BFloat16[Array, " D"],
    table: Int32[Array, "1 entries 2"],
    *,
    eps: float,
    offset: float,
) -> tuple[BFloat16[Array, "T D"], BFloat16[Array, "T D"]]:
    """residual plus the sum of parts, and of that over devices, and the RMS norm of the result times (gain + offset).

    A device adds up its parts one after the other in float32 and rounds their sum, which it sends. Those sums, in the order of ranks,
    and the residual are added in float32 and rounded once, so that all devices get the same bits; the norm is of the rounded sum.

    Args:
        parts: such that can_norm.
        table: as all_reduce's.
    """
    devices, (rows, width) = table.shape[1] - 1, residual.shape
    wide_parts = parts.shape[0] if parts.dtype == jnp.float32 else 0

    def all_reduce_norm_kernel(*refs: Any) -> None:
        def body(_: Any, x: Any, residual: Any, gain: Any, table: Any, total: Any, normed: Any, shared: Any) -> None:
            place = enter(table, devices)
            with mgpu.when(less(place.block, const(rows))):
                team = _Team(place, rows, width, devices)
                words = team.add(address_of(x), wide_parts, address_of(residual), address_of(total))
                team.norm(words, address_of(gain), address_of(normed), shared, eps, offset)
            place.leave(1)

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(body)(*refs)

    result: tuple[Array, Array] = plgpu.kernel(
        all_reduce_norm_kernel,
        out_type=(jax.ShapeDtypeStruct(residual.shape, residual.dtype),) * 2,
        grid=(BLOCKS,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((MOST_UNITS * WARPS,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(),
    )(parts, residual, gain, table.reshape(-1))
    return result


class _Team:
    """A thread block and its rows: its own number, and each BLOCKS further. Past the last row it does that again: the same bits."""

    def __init__(self, place: Any, rows: int, width: int, devices: int) -> None:
        self.place, self.rows, self.width, self.devices = place, rows, width, devices
        self.units = width // UNIT
        own = [plus(place.block, const(i * BLOCKS)) for i in range(math.ceil(rows / BLOCKS))]
        column = times(place.thread, 16)
        self.offsets = [plus(times(arith.minui(row, const(rows - 1)), 2 * width), column) for row in own]
        self.column = column

    def add(self, x: Any, wide_parts: int, residual: Any, total: Any) -> list[list[Words]]:
        """Stores residual plus all devices' x to total; also gives it, by row and unit, as pairs of bfloat16.

        Args:
            wide_parts: in how many parts x is, of float32; 0 where it is of bfloat16.
        """
        place = self.place
        count = place.counted(1)
        slots = slots_of(count, self.devices)
        # Parts row by row, as there may be many; what needs no sum is loaded at once.
        added = (self._add_parts(x, offset, wide_parts) for offset in self.offsets)
        rows = added if wide_parts else [self._load(plus(x, offset)) for offset in self.offsets]
        for offset, row in zip(self.offsets, rows, strict=True):
            for base in (*place.lent, place.own):
                self._store(plus(base, slots, times(place.rank, SLOT_BYTES), offset), row)
        place.meet(count)
        sources = [plus(place.own, slots, const(rank * SLOT_BYTES)) for rank in range(self.devices)]
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

    def _add_parts(self, x: Any, offset: Any, count: int) -> list[Words]:
        """A row that is in so many parts of float32: their sum in bfloat16, by unit. Offsets are those of bfloat16."""
        f32, part_bytes = ir.F32Type.get(), 4 * self.rows * self.width
        first = plus(x, times(offset, 2))
        parts = [plus(first, const(part * part_bytes)) for part in range(count)]
        at_once, row = max(1, AT_ONCE // (2 * count)), list[Words]()
        for begin in range(0, self.units, at_once):
            starts = [2 * UNIT_BYTES * unit for unit in range(begin, min(begin + at_once, self.units))]
            loaded = [[[*load_16(part, start), *load_16(part, start + 16)] for part in parts] for start in starts]
            for of_unit in loaded:
                columns = zip(*of_unit, strict=True)
                sums = [functools.reduce(arith.addf, (arith.bitcast(f32, word) for word in column)) for column in columns]
                row.append([pack(*sums[i : i + 2]) for i in range(0, 8, 2)])
        return row

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
