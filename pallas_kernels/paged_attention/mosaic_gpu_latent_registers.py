"""Latent attention's code for Mosaic's registers: a causal mask, and the merge of partial results."""

from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_registers import (
    SCALAR,
    THREADS,
    constant,
    element_at,
    is_below,
    thread_index,
)

plgpu: Any = _mosaic_gpu  # not typed
mgpu: Any = _utils

SHARERS = 8  # threads of a row


def mask_columns(x: jax.Array, first: jax.Array, most: jax.Array, *, rows: int) -> jax.Array:
    """-inf in the columns of `x` [64, n] from min(first + row // rows, most) on.

    Column by column against a bound, so that no column's number takes a register.
    """

    def mask(ctx: Any, x: Any, first: Any, most: Any) -> Any:
        f32 = ir.F32Type.get()
        pair = ir.VectorType.get((2,), f32)
        low = mgpu.c(-np.inf, f32)
        lane = arith.remui(thread_index(), constant(32))
        top = arith.addi(arith.muli(arith.divui(thread_index(), constant(32)), constant(16)), arith.divui(lane, constant(4)))
        left = arith.muli(arith.remui(lane, constant(4)), constant(2))
        masked = np.empty_like(x.registers)
        for half in range(2):
            seat = arith.divui(arith.addi(top, constant(8 * half)), constant(rows))
            bound = arith.minsi(arith.addi(first.registers.item(), seat), most.registers.item())
            bound = arith.subi(bound, left)
            for n in range(x.shape[1] // 8):
                both = x.registers[0, n, 0, 0, half, 0, 0, 0, 0]
                kept = [
                    arith.select(
                        arith.cmpi(arith.CmpIPredicate.slt, constant(8 * n + e), bound),
                        llvm.extractelement(both, constant(e)),
                        low,
                    )
                    for e in range(2)
                ]
                masked[0, n, 0, 0, half, 0, 0, 0, 0] = vector.from_elements(pair, kept)
        return FragmentedArray(_registers=masked, _layout=x.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)
    types = (plgpu.Layout.WGMMA, SCALAR, SCALAR)
    masked: jax.Array = plgpu.inline_mgpu(arg_types=types, return_type=result)(mask)(x, first, most)
    return masked


def merge_columns(
    parts: Any, lse: Any, counters: Any, out: Any, first: jax.Array, count: jax.Array, index: jax.Array, base: jax.Array,
    half: jax.Array, *, rows: int, stride: int, unroll: int = 4,
) -> None:  # fmt: skip
    """Merges half of the columns of slots first, first + stride, ... (`count` of them); clears counters[index].

    parts [slots, rows, H] f32 are normalised partial results, lse [slots, 2, rows] their log-sum-exps to base 2, of each half: the
    result is sum_s 2^(lse_s - max) parts_s / sum_s 2^(lse_s - max). It goes to out's elements base + row * H + column, for
    columns below H / 2.
    """
    dim = parts.shape[-1]
    width = dim // 2
    vectors = width // (4 * SHARERS)

    def merge(ctx: Any, parts: Any, lse: Any, counters: Any, out: Any, *scalars: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        out_type = ir.MemRefType(out.type).element_type
        four = ir.VectorType.get((4,), f32)
        first, count, index, base, half = (s.registers.item() for s in scalars)
        column = arith.muli(arith.remui(thread_index(), constant(SHARERS)), constant(4))

        def spread(x: Any) -> Any:
            return vector.broadcast(four, x)

        def exp2(x: Any) -> Any:
            return mgpu.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=f32)

        for start in range(0, rows, THREADS // SHARERS):
            row = arith.addi(arith.divui(thread_index(), constant(SHARERS)), constant(start))
            with mgpu.when(is_below(row, constant(rows))):
                inside = arith.addi(arith.addi(arith.muli(row, constant(dim)), arith.muli(half, constant(width))), column)

                def chunk(k: Any, carry: Any, row: Any = row, inside: Any = inside) -> Any:
                    *sums, top, total = carry
                    weights, values = [], []
                    for u in range(unroll):
                        s = arith.addi(arith.muli(k, constant(unroll)), constant(u))
                        used = is_below(s, count)
                        slot = arith.addi(first, arith.muli(arith.select(used, s, constant(0)), constant(stride)))
                        at = arith.addi(arith.muli(arith.addi(arith.muli(slot, constant(2)), half), constant(rows)), row)
                        weights.append(arith.select(used, llvm.load(f32, element_at(lse, at, f32)), mgpu.c(-1e30, f32)))
                        at = element_at(parts, arith.addi(arith.muli(slot, constant(rows * dim)), inside), f32)
                        values.append(
                            [
                                llvm.load(four, mgpu.getelementptr(at, [4 * SHARERS * v], f32), alignment=16)
                                for v in range(vectors)
                            ]
                        )
                    high = top
                    for w in weights:
                        high = arith.maximumf(high, w)
                    shrink = exp2(arith.subf(top, high))
                    sums = [arith.mulf(x, spread(shrink)) for x in sums]
                    total = arith.mulf(total, shrink)
                    for w, row_values in zip(weights, values, strict=True):
                        w = exp2(arith.subf(w, high))
                        sums = [arith.addf(x, arith.mulf(v, spread(w))) for x, v in zip(sums, row_values, strict=True)]
                        total = arith.addf(total, w)
                    return [*sums, high, total]

                zero = mgpu.c(0.0, f32)
                state = [*[spread(zero)] * vectors, mgpu.c(-1e30, f32), zero]
                *sums, _, total = mgpu.fori(arith.ceildivui(count, constant(unroll)), state)(chunk).results
                scale = spread(arith.divf(mgpu.c(1.0, f32), total))
                to = arith.addi(arith.addi(base, arith.muli(row, constant(dim))), column)
                for v, x in enumerate(sums):
                    x = arith.truncf(ir.VectorType.get((4,), out_type), arith.mulf(x, scale))
                    llvm.store(x, element_at(out, arith.addi(to, constant(4 * SHARERS * v)), out_type), alignment=8)
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, thread_index(), constant(0))):
            llvm.store(constant(0), element_at(counters, index, i32))

    types = (plgpu.RefType(),) * 4 + (SCALAR,) * 5
    plgpu.inline_mgpu(arg_types=types)(merge)(parts, lse, counters, out, first, count, index, base, half)
