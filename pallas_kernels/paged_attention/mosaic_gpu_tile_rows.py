"""A tile of 64 rows that belong to several requests: load, store and count them in. Register code, beside mosaic_gpu_registers.py.

The requests' rows of the batch stand in `rows[start:start + count]`. Each has `group` rows of the tile, one after the other; of
the request in row b they are at elements base + b * stride + i * H, for i in [0, group).
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_registers import (
    ROW_VALUES,
    SCALAR,
    constant,
    element_at,
    is_below,
    thread_index,
)
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import ROWS

plgpu: Any = _mosaic_gpu  # not typed
mgpu: Any = _utils


def _own_rows(rows: Any, start: Any, count: Any, *, group: int) -> Iterator[tuple[int, Any, Any, Any]]:
    """For both of a thread's rows: which half, whether it is in use, row of the batch (a used one's, if not) and number in the group."""
    word = ir.IntegerType.get_signless(32)
    lane = arith.remui(thread_index(), constant(32))
    # Warp w holds rows 16 w + lane / 4 and 8 more.
    top = arith.addi(arith.muli(arith.divui(thread_index(), constant(32)), constant(16)), arith.divui(lane, constant(4)))
    for half in range(2):
        row = arith.addi(top, constant(8 * half))
        seat = arith.divui(row, constant(group))
        last = arith.subi(count, constant(1))
        index = arith.addi(start, arith.minui(seat, last))
        yield half, is_below(seat, count), llvm.load(word, element_at(rows, index, word)), arith.remui(row, constant(group))


def _first_column() -> Any:
    """A lane has columns 8 n + 2 (lane % 4) and the next one of its rows."""
    return arith.muli(arith.remui(thread_index(), constant(4)), constant(2))


def load_tile_rows(
    source: Any, rows: Any, start: jax.Array, count: jax.Array, base: jax.Array, *, group: int, stride: int
) -> jax.Array:
    """The tile [64, H], from source [..., H]; rows not in use repeat others, so they are finite."""
    dim = source.shape[-1]

    def get(ctx: Any, source: Any, rows: Any, *scalars: Any) -> Any:
        start, count, base = (s.registers.item() for s in scalars)
        element = ir.MemRefType(source.type).element_type
        pair = ir.VectorType.get((2,), element)
        registers = np.empty((1, dim // 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        for half, _, row, number in _own_rows(rows, start, count, group=group):
            offset = arith.addi(arith.addi(base, _first_column()), arith.muli(row, constant(stride)))
            place = element_at(source, arith.addi(offset, arith.muli(number, constant(dim))), element)
            for n in range(dim // 8):
                registers[0, n, 0, 0, half, 0, 0, 0, 0] = llvm.load(pair, mgpu.getelementptr(place, [8 * n], element))
        return FragmentedArray(_registers=registers, _layout=plgpu.Layout.WGMMA.to_mgpu(), _is_signed=None)

    types = (plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR, SCALAR)
    result = plgpu.ShapeDtypeStruct((ROWS, dim), source.dtype, layout=plgpu.Layout.WGMMA)
    loaded: jax.Array = plgpu.inline_mgpu(arg_types=types, return_type=result)(get)(source, rows, start, count, base)
    return loaded


def store_tile_rows(
    acc: jax.Array, out: Any, rows: Any, start: jax.Array, count: jax.Array, base: jax.Array, *, group: int, stride: int
) -> None:
    """Stores the rows in use of `acc` [64, H] to `out` [..., H]."""
    dim = acc.shape[1]
    acc = acc.astype(out.dtype)

    def put(ctx: Any, acc: Any, out: Any, rows: Any, *scalars: Any) -> None:
        start, count, base = (s.registers.item() for s in scalars)
        element = ir.MemRefType(out.type).element_type
        for half, used, row, number in _own_rows(rows, start, count, group=group):
            offset = arith.addi(arith.addi(base, _first_column()), arith.muli(row, constant(stride)))
            with mgpu.when(used):
                place = element_at(out, arith.addi(offset, arith.muli(number, constant(dim))), element)
                for n in range(dim // 8):
                    llvm.store(acc.registers[0, n, 0, 0, half, 0, 0, 0, 0], mgpu.getelementptr(place, [8 * n], element))

    types = (plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR, SCALAR)
    plgpu.inline_mgpu(arg_types=types)(put)(acc, out, rows, start, count, base)


def store_tile_row_values(
    x: jax.Array, out: Any, rows: Any, start: jax.Array, count: jax.Array, base: jax.Array, *, group: int, stride: int
) -> None:
    """Stores the elements in use of `x` [64], one a row of the tile: H is 1."""

    def put(ctx: Any, x: Any, out: Any, rows: Any, *scalars: Any) -> None:
        start, count, base = (s.registers.item() for s in scalars)
        element = ir.MemRefType(out.type).element_type
        leads = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(thread_index(), constant(4)), constant(0))
        for half, used, row, number in _own_rows(rows, start, count, group=group):
            with mgpu.when(arith.andi(leads, used)):
                offset = arith.addi(arith.addi(base, arith.muli(row, constant(stride))), number)
                llvm.store(x.registers[0, 0, half, 0, 0], element_at(out, offset, element))

    types = (ROW_VALUES, plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR, SCALAR)
    plgpu.inline_mgpu(arg_types=types)(put)(x, out, rows, start, count, base)


def arrive_for_rows(
    counters: Any, rows: Any, wanted: Any, start: jax.Array, count: jax.Array, base: jax.Array, shared: Any, slot: jax.Array, *,
    stride: int,
) -> None:  # fmt: skip
    """Adds 1 to counters[base + b * stride] for each row b of the batch, once per warpgroup, as `arrive` does for one.

    shared[slot + i] (int32 in shared memory) becomes 1 where this is the last of wanted[b] arrivals, else 0, for the i-th row: the
    i-th thread asks, so that all atomics are under way at once.
    """

    def ask(ctx: Any, counters: Any, rows: Any, wanted: Any, shared: Any, *scalars: Any) -> None:
        start, count, base, slot = (s.registers.item() for s in scalars)
        word = ir.IntegerType.get_signless(32)
        mgpu.warpgroup_barrier()
        with mgpu.when(is_below(thread_index(), count)):
            row = llvm.load(word, element_at(rows, arith.addi(start, thread_index()), word))
            before = mgpu.inline_ptx(
                "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;",
                element_at(counters, arith.addi(base, arith.muli(row, constant(stride))), word),
                result_types=word,
                has_side_effects=True,
            )
            last = arith.cmpi(
                arith.CmpIPredicate.eq, arith.addi(before, constant(1)), llvm.load(word, element_at(wanted, row, word))
            )
            llvm.store(arith.extui(word, last), element_at(shared, arith.addi(slot, thread_index()), word))
        mgpu.warpgroup_barrier()

    types = (plgpu.RefType(),) * 4 + (SCALAR,) * 4
    plgpu.inline_mgpu(arg_types=types)(ask)(counters, rows, wanted, shared, start, count, base, slot)
