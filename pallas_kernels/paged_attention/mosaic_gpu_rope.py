"""Rope and page write for Hopper in one kernel: the projection to q, k and v is read once, and all three are written where they go.

Register code: a thread turns 8 numbers of a head's first half and the 8 that they are paired with.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int

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

VECTOR = 8  # numbers that a thread reads at once: 16 bytes


def check_rotate(qkv: jax.Array, kv_pages: jax.Array, rotary_dim: int) -> None:
    """Raises NotImplementedError for shapes and types that the kernel does not serve."""
    head_dim = qkv.shape[-1]
    if not qkv.dtype == kv_pages.dtype == jnp.bfloat16:
        raise NotImplementedError(f"rope and page write are one kernel in bfloat16; got {qkv.dtype} and {kv_pages.dtype}")
    if rotary_dim != head_dim or head_dim % (2 * VECTOR):
        raise NotImplementedError(f"the kernel rotates whole heads of a multiple of 16; got {rotary_dim} of {head_dim}")


def rotate_and_write(
    qkv: Float[Array, "T K G+2 H"],
    cos: Float[Array, "T H/2"],
    sin: Float[Array, "T H/2"],
    kv_pages: Float[Array, "pages page_size 2*K H"],
    write_slots: Int[Array, " T"],
    row_scales: Float[Array, " T"] | None = None,
    scales: Float[Array, "K G+2 H"] | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "pages page_size 2*K H"]]:
    """See api.rotate_and_write.

    Raises:
        NotImplementedError: see check_rotate.
    """
    check_rotate(qkv, kv_pages, 2 * cos.shape[-1])
    tokens, num_kv_heads, parts, head_dim = qkv.shape
    scaling = () if row_scales is None or scales is None else (row_scales, scales)
    pool = jax.new_ref(kv_pages)

    def rope_write(qkv: Any, cos: Any, sin: Any, write_slots: Any, *rest: Any) -> None:
        *scaling, pool, q = rest
        token = lax.axis_index("token")
        turn_token(token, write_slots[token], qkv, cos, sin, q, pool, *scaling)

    q: jax.Array = plgpu.kernel(
        rope_write,
        out_type=jax.ShapeDtypeStruct((tokens, num_kv_heads * (parts - 2), head_dim), qkv.dtype),
        grid=(tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(),
    )(qkv, cos, sin, write_slots, *scaling, pool)
    written: jax.Array = pool[...]
    return q, written


def turn_token(token: jax.Array, slot: jax.Array, qkv: Any, cos: Any, sin: Any, q: Any, pool: Any, *scaling: Any) -> None:
    """Stores a token's queries in q, its keys and values in the pool's row `slot`, if there is one."""
    _, num_kv_heads, parts, head_dim = qkv.shape
    pages, page_size = pool.shape[:2]
    half, chunks = head_dim // 2, head_dim // 2 // VECTOR
    units = num_kv_heads * parts * chunks

    def turn(ctx: Any, token: Any, slot: Any, qkv: Any, cos: Any, sin: Any, q: Any, pool: Any, *scaling: Any) -> None:
        token, slot = token.registers.item(), slot.registers.item()

        def turn_unit(unit: Any) -> None:
            head, column = arith.divui(unit, constant(chunks)), _times(arith.remui(unit, constant(chunks)), VECTOR)
            kv_head, part = arith.divui(head, constant(parts)), arith.remui(head, constant(parts))
            place = arith.addi(_times(head, head_dim), column)
            pair = []
            for offset in (0, half):
                at = arith.addi(place, constant(offset))
                numbers = _load(qkv, arith.addi(_times(token, num_kv_heads * parts * head_dim), at))
                if scaling:
                    numbers = arith.mulf(numbers, vector.broadcast(numbers.type, _load(scaling[0], token, 1)))
                    numbers = arith.mulf(numbers, _load(scaling[1], at))
                pair.append(numbers)
            c, s = (_load(x, arith.addi(_times(token, half), column)) for x in (cos, sin))
            turned = [
                arith.subf(arith.mulf(pair[0], c), arith.mulf(pair[1], s)),
                arith.addf(arith.mulf(pair[1], c), arith.mulf(pair[0], s)),
            ]
            with mgpu.when(is_below(part, constant(parts - 2))):
                row = arith.addi(_times(arith.addi(_times(token, num_kv_heads), kv_head), parts - 2), part)
                _store(turned, q, row, column, head_dim)
            is_kept = arith.andi(is_below(constant(parts - 3), part), is_below(slot, constant(pages * page_size)))
            with mgpu.when(is_kept):
                is_value = arith.cmpi(arith.CmpIPredicate.eq, part, constant(parts - 1))
                row = arith.addi(_times(kv_head, 2), arith.subi(part, constant(parts - 2)))
                row = arith.addi(_times(slot, 2 * num_kv_heads), row)
                _store([arith.select(is_value, *both) for both in zip(pair, turned, strict=True)], pool, row, column, head_dim)

        for first in range(0, units, THREADS):
            unit = arith.addi(thread_index(), constant(first))
            if first + THREADS <= units:
                turn_unit(unit)
                continue
            with mgpu.when(is_below(unit, constant(units))):
                turn_unit(unit)

    arrays = (qkv, cos, sin, q, pool, *scaling)
    plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, *(plgpu.RefType() for _ in arrays)))(turn)(token, slot, *arrays)


def _times(x: Any, factor: int) -> Any:
    return arith.muli(x, constant(factor))


def _load(ref: Any, offset: Any, count: int = VECTOR) -> Any:
    """Neighbouring elements in float32."""
    f32, element = ir.F32Type.get(), ir.MemRefType(ref.type).element_type
    place = element_at(ref, offset, element)
    if count == 1:
        return llvm.load(f32, place)
    loaded = llvm.load(ir.VectorType.get((count,), element), place, alignment=16)
    return loaded if element == f32 else arith.extf(ir.VectorType.get((count,), f32), loaded)


def _store(pair: list[Any], ref: Any, row: Any, column: Any, head_dim: int) -> None:
    """Both halves' numbers, from a column of a row of heads on."""
    element, i64 = ir.MemRefType(ref.type).element_type, ir.IntegerType.get_signless(64)
    offset = arith.muli(arith.extui(i64, row), mgpu.c(head_dim, i64))  # of a large pool 32 bits do not suffice
    place = mgpu.getelementptr(element_at(ref, offset, element), [column], element)
    for i, numbers in enumerate(pair):
        rounded = arith.truncf(ir.VectorType.get((VECTOR,), element), numbers)
        llvm.store(rounded, mgpu.getelementptr(place, [i * head_dim // 2], element), alignment=16)
