"""What Pallas has no words for on the GPU: stores of chosen accumulator rows, and a merge of partial results by the last to arrive.

Knows Mosaic's register layouts and emits MLIR; knows nothing of attention beyond the log-sum-exp rule.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray, WGSplatFragLayout
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

plgpu: Any = _mosaic_gpu  # not typed
mgpu: Any = _utils

THREADS = 128  # of a warpgroup
SCALAR = plgpu.Layout.WG_SPLAT(())
ROW_VALUES = plgpu.Layout.WGMMA.reduce(1)


def constant(x: int) -> Any:
    return mgpu.c(x, ir.IntegerType.get_signless(32))


def thread_index() -> Any:
    return arith.remui(mgpu.thread_idx(), constant(THREADS))


def is_below(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def element_at(ref: Any, offset: Any, element: Any) -> Any:
    return mgpu.getelementptr(mgpu.memref_ptr(ref), [offset], element)


def store_rows(acc: jax.Array, out: Any, base: jax.Array, first: jax.Array, count: jax.Array, *, stride: int) -> None:
    """Stores rows [first, first + count) of `acc` [64, H] to out's elements base + stride * (row - first).

    Straight from registers (layout WGMMA): other rows go nowhere, which no bulk copy can do.
    """
    num_cols = acc.shape[1]
    acc = acc.astype(out.dtype)

    def put(ctx: Any, acc: Any, out: Any, base: Any, first: Any, count: Any) -> None:
        element = ir.MemRefType(out.type).element_type
        lane = arith.remui(thread_index(), constant(32))
        # Warp w holds rows 16 w + lane / 4 and 8 more; a lane has columns 8 n + 2 (lane % 4) and the next one.
        top = arith.addi(arith.muli(arith.divui(thread_index(), constant(32)), constant(16)), arith.divui(lane, constant(4)))
        top = arith.subi(top, first.registers.item())  # below zero is a large unsigned number
        col = arith.addi(base.registers.item(), arith.muli(arith.remui(lane, constant(4)), constant(2)))
        for half in range(2):
            row = arith.addi(top, constant(8 * half))
            with mgpu.when(is_below(row, count.registers.item())):
                at = element_at(out, arith.addi(col, arith.muli(row, constant(stride))), element)
                for n in range(num_cols // 8):
                    llvm.store(acc.registers[0, n, 0, 0, half, 0, 0, 0, 0], mgpu.getelementptr(at, [8 * n], element))

    types = (plgpu.Layout.WGMMA, plgpu.RefType(), SCALAR, SCALAR, SCALAR)
    plgpu.inline_mgpu(arg_types=types)(put)(acc, out, base, first, count)


def store_row_values(x: jax.Array, out: Any, base: jax.Array, first: jax.Array, count: jax.Array) -> None:
    """Stores elements [first, first + count) of `x` [64], one a row of an accumulator, to out's elements from base on."""

    def put(ctx: Any, x: Any, out: Any, base: Any, first: Any, count: Any) -> None:
        element = ir.MemRefType(out.type).element_type
        lane = arith.remui(thread_index(), constant(32))
        top = arith.addi(arith.muli(arith.divui(thread_index(), constant(32)), constant(16)), arith.divui(lane, constant(4)))
        top = arith.subi(top, first.registers.item())
        leads = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, constant(4)), constant(0))
        for half in range(2):
            row = arith.addi(top, constant(8 * half))
            with mgpu.when(arith.andi(leads, is_below(row, count.registers.item()))):
                llvm.store(x.registers[0, 0, half, 0, 0], element_at(out, arith.addi(base.registers.item(), row), element))

    types = (ROW_VALUES, plgpu.RefType(), SCALAR, SCALAR, SCALAR)
    plgpu.inline_mgpu(arg_types=types)(put)(x, out, base, first, count)


def arrive(counters: Any, index: jax.Array, shared: Any, slot: jax.Array) -> jax.Array:
    """Adds 1 to counters[index] once per warpgroup and returns the value before.

    Releases what the warpgroup stored before and acquires what earlier arrivals stored: whoever sees the last value may
    read all of it. `shared` [n] int32 in shared memory carries the value to the other threads through its element `slot`.
    """

    def count(ctx: Any, counters: Any, index: Any, shared: Any, slot: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        box = element_at(shared, slot.registers.item(), i32)
        mgpu.warpgroup_barrier()
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, thread_index(), constant(0))):
            before = mgpu.inline_ptx(
                "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;",
                element_at(counters, index.registers.item(), i32),
                result_types=i32,
                has_side_effects=True,
            )
            llvm.store(before, box)
        mgpu.warpgroup_barrier()
        return FragmentedArray.splat(llvm.load(i32, box), (), WGSplatFragLayout(()), is_signed=True)

    types = (plgpu.RefType(), SCALAR, plgpu.RefType(), SCALAR)
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
    before: jax.Array = plgpu.inline_mgpu(arg_types=types, return_type=result)(count)(counters, index, shared, slot)
    return before


def take(counters: Any, index: jax.Array | int, total: jax.Array, shared: Any, slot: jax.Array) -> jax.Array:
    """Adds 1 to counters[index] once per warpgroup and returns the value before; the last of `total` takers clears the counter.

    Orders nothing else in memory. `shared` and `slot` as in `arrive`.
    """

    def add(ctx: Any, counters: Any, index: Any, total: Any, shared: Any, slot: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        box = element_at(shared, slot.registers.item(), i32)
        counter = element_at(counters, index.registers.item(), i32)
        mgpu.warpgroup_barrier()
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, thread_index(), constant(0))):
            before = mgpu.inline_ptx(
                "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;", counter, result_types=i32, has_side_effects=True
            )
            llvm.store(before, box)
            last = arith.subi(total.registers.item(), constant(1))
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, before, last)):
                llvm.store(constant(0), counter)
        mgpu.warpgroup_barrier()
        return FragmentedArray.splat(llvm.load(i32, box), (), WGSplatFragLayout(()), is_signed=True)

    types = (plgpu.RefType(), SCALAR, SCALAR, plgpu.RefType(), SCALAR)
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
    before: jax.Array = plgpu.inline_mgpu(arg_types=types, return_type=result)(add)(
        counters, jnp.int32(index), total, shared, slot
    )
    return before


def merge_partials(
    parts: Any,
    lse: Any,
    counters: Any,
    out: Any,
    first: jax.Array,
    count: jax.Array,
    index: jax.Array,
    base: jax.Array,
    *,
    rows: int,
    stride: int,
    unroll: int = 8,
) -> None:
    """Writes the merge of slots first, first + stride, ... (`count` of them) to out's elements from base on; clears the counter.

    parts [slots, rows, H] f32 are normalised partial results, lse [slots, rows] their log-sum-exps to base 2:
    the result is sum_s 2^(lse_s - max) parts_s / sum_s 2^(lse_s - max).
    """
    dim = parts.shape[-1]

    def merge(ctx: Any, parts: Any, lse: Any, counters: Any, out: Any, *scalars: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        out_type = ir.MemRefType(out.type).element_type
        four = ir.VectorType.get((4,), f32)
        first, count, index, base = (s.registers.item() for s in scalars)

        def spread(x: Any) -> Any:
            return vector.broadcast(four, x)

        def exp2(x: Any) -> Any:
            return mgpu.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=f32)

        for start in range(0, rows * dim, 4 * THREADS):
            element = arith.addi(arith.muli(thread_index(), constant(4)), constant(start))
            with mgpu.when(is_below(element, constant(rows * dim))):
                row = arith.divui(element, constant(dim))
                zero = mgpu.c(0.0, f32)

                def chunk(k: Any, carry: Any, element: Any = element, row: Any = row) -> Any:
                    acc, top, total = carry
                    values, weights = [], []
                    for u in range(unroll):
                        s = arith.addi(arith.muli(k, constant(unroll)), constant(u))
                        used = is_below(s, count)
                        slot = arith.addi(first, arith.muli(arith.select(used, s, constant(0)), constant(stride)))
                        at = element_at(lse, arith.addi(arith.muli(slot, constant(rows)), row), f32)
                        weights.append(arith.select(used, llvm.load(f32, at), mgpu.c(-1e30, f32)))
                        at = element_at(parts, arith.addi(arith.muli(slot, constant(rows * dim)), element), f32)
                        values.append(llvm.load(four, at, alignment=16))
                    high = top
                    for w in weights:
                        high = arith.maximumf(high, w)
                    shrink = exp2(arith.subf(top, high))
                    acc, total = arith.mulf(acc, spread(shrink)), arith.mulf(total, shrink)
                    for w, v in zip(weights, values, strict=True):
                        w = exp2(arith.subf(w, high))
                        acc = arith.addf(acc, arith.mulf(v, spread(w)))
                        total = arith.addf(total, w)
                    return [acc, high, total]

                state = [spread(zero), mgpu.c(-1e30, f32), zero]
                acc, _, total = mgpu.fori(arith.ceildivui(count, constant(unroll)), state)(chunk).results
                acc = arith.mulf(acc, spread(arith.divf(mgpu.c(1.0, f32), total)))
                if out_type != f32:
                    acc = arith.truncf(ir.VectorType.get((4,), out_type), acc)
                llvm.store(acc, element_at(out, arith.addi(base, element), out_type), alignment=8)
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, thread_index(), constant(0))):
            llvm.store(constant(0), element_at(counters, index, i32))

    types = (plgpu.RefType(),) * 4 + (SCALAR,) * 4
    plgpu.inline_mgpu(arg_types=types)(merge)(parts, lse, counters, out, first, count, index, base)
