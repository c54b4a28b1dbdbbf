"""What Pallas has no words for: what each warp's numbers come to. Mosaic's own reductions share one scratch among all warpgroups."""

import functools
from typing import Any, Literal

import jax
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

plgpu: Any = _mosaic_gpu  # not typed
mgpu: Any = _utils

WARPS = 4  # of a warpgroup
Combine = Literal["add", "max"]


def store_warp_parts(x: jax.Array, parts: Any, first: jax.Array, combine: Combine, vector_size: int) -> None:
    """Stores the sum or the largest of what each warp has of x, a warpgroup's, to parts[first + warp] in shared memory.

    Args:
        x: [n] in float32, `vector_size` neighbouring numbers a thread.
    """
    f32 = ir.F32Type

    def put(ctx: Any, x: Any, parts: Any, first: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        both = arith.addf if combine == "add" else arith.maximumf  # the larger of a number and NaN is NaN
        numbers = functools.reduce(both, x.registers.flat)
        total = functools.reduce(both, (vector.extract(numbers, [], [i]) for i in range(vector_size)))
        for distance in (16, 8, 4, 2, 1):
            total = both(total, mgpu.shfl_bfly(total, distance))
        thread = arith.remui(mgpu.thread_idx(), mgpu.c(32 * WARPS, i32))
        warp, lane = arith.divui(thread, mgpu.c(32, i32)), arith.remui(thread, mgpu.c(32, i32))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, lane, mgpu.c(0, i32))):
            at = arith.addi(first.registers.item(), warp)
            llvm.store(total, mgpu.getelementptr(mgpu.memref_ptr(parts), [at], f32.get()))

    types = (plgpu.Layout.WG_STRIDED(x.shape, vec_size=vector_size), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
    plgpu.inline_mgpu(arg_types=types)(put)(x, parts, first)
