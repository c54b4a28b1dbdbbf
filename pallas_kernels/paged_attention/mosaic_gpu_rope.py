"""Rope and page write for Hopper in one kernel: the projection to q, k and v is read once, and all three are written where they go.
The projection may still be in parts that are to be added up, and queries and keys may be normalised in front.

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
from jaxlib.mlir.dialects import math as mlir_math
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

VECTOR = 8  # numbers that a thread has of each half: 16 bytes in bfloat16
FEW_TOKENS = 264  # up to which a thread turns one such pair alone, so that all multiprocessors have work


def check_rotate(qkv: jax.Array, kv_pages: jax.Array, rotary_dim: int, *, has_norms: bool) -> None:
    """Raises NotImplementedError for shapes and types that the kernel does not serve."""
    head_dim = qkv.shape[-1]
    if has_norms and head_dim not in (16, 32, 64, 128, 256, 512):  # half a head to 1, 2, 4, ... threads of a warp
        raise NotImplementedError(f"the kernel normalises heads of a power of 2 up to 512; got {head_dim}")
    wanted = jnp.float32 if qkv.ndim == 5 else jnp.bfloat16
    if qkv.dtype != wanted or kv_pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"rope and page write are one kernel in bfloat16; got {qkv.dtype} and {kv_pages.dtype}")
    if rotary_dim != head_dim or head_dim % (2 * VECTOR):
        raise NotImplementedError(f"the kernel rotates whole heads of a multiple of 16; got {rotary_dim} of {head_dim}")


def rotate_and_write(
    qkv: Float[Array, "... T K G+2 H"],
    cos: Float[Array, "T H/2"],
    sin: Float[Array, "T H/2"],
    kv_pages: Float[Array, "pages page_size 2*K H"],
    write_slots: Int[Array, " T"],
    row_scales: Float[Array, " T"] | None = None,
    scales: Float[Array, "K G+2 H"] | None = None,
    gains: tuple[Float[Array, " H"], Float[Array, " H"]] | None = None,
    *,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Float[Array, "T N H"], Float[Array, "pages page_size 2*K H"]]:
    """See api.rotate_and_write.

    Raises:
        NotImplementedError: see check_rotate.
    """
    check_rotate(qkv, kv_pages, 2 * cos.shape[-1], has_norms=gains is not None)
    tokens, num_kv_heads, parts, head_dim = qkv.shape[-4:]
    scaling = () if row_scales is None or scales is None else (row_scales, scales)
    pool = jax.new_ref(kv_pages)
    units = num_kv_heads * parts * (head_dim // 2 // VECTOR)
    blocks = -(-units // THREADS) if tokens <= FEW_TOKENS else 1

    def rope_write(qkv: Any, cos: Any, sin: Any, write_slots: Any, *rest: Any) -> None:
        *more, pool, q = rest
        place = lax.axis_index("place")
        token, own = lax.axis_index("token"), (tuple(more[: len(scaling)]), tuple(more[len(scaling) :]))
        turn_token(token, write_slots[token], place, qkv, cos, sin, q, pool, *own, blocks=blocks, eps=eps, offset=offset)

    q: jax.Array = plgpu.kernel(
        rope_write,
        out_type=jax.ShapeDtypeStruct((tokens, num_kv_heads * (parts - 2), head_dim), kv_pages.dtype),
        grid=(tokens, blocks),
        grid_names=("token", "place"),
        compiler_params=plgpu.CompilerParams(),
    )(qkv, cos, sin, write_slots, *scaling, *(gains or ()), pool)
    written: jax.Array = pool[...]
    return q, written


def turn_token(
    token: jax.Array, slot: jax.Array, place: jax.Array, qkv: Any, cos: Any, sin: Any, q: Any, pool: Any,
    scaling: tuple[Any, ...], gains: tuple[Any, ...], *, blocks: int, eps: float, offset: float,
) -> None:  # fmt: skip
    """Stores a token's queries in q, its keys and values in the pool's row `slot`, if there is one; each of `blocks` thread blocks
    does those at its place.
    """
    *sums, tokens, num_kv_heads, parts, head_dim = qkv.shape
    num_slots = pool.shape[0] * pool.shape[1]
    half, chunks = head_dim // 2, head_dim // 2 // VECTOR
    units = num_kv_heads * parts * chunks

    def turn(ctx: Any, token: Any, slot: Any, place: Any, qkv: Any, cos: Any, sin: Any, q: Any, pool: Any, *rest: Any) -> None:
        token, slot, place = token.registers.item(), slot.registers.item(), place.registers.item()
        scaling_refs, gain_refs = rest[: len(scaling)], rest[len(scaling) :]

        def turn_unit(unit: Any) -> None:
            is_one = is_below(unit, constant(units))
            unit = arith.minui(unit, constant(units - 1))  # threads without a unit read along: all of a warp add up norms
            head, column = arith.divui(unit, constant(chunks)), _times(arith.remui(unit, constant(chunks)), VECTOR)
            kv_head, part = arith.divui(head, constant(parts)), arith.remui(head, constant(parts))
            is_query, is_value = is_below(part, constant(parts - 2)), is_below(constant(parts - 2), part)
            inside = arith.addi(_times(head, head_dim), column)
            source = arith.addi(_times(token, num_kv_heads * parts * head_dim), inside)
            pair = [_load(qkv, arith.addi(source, constant(i))) for i in (0, half)]
            for part_of_sum in range(1, sums[0] if sums else 1):
                at = arith.addi(source, constant(part_of_sum * tokens * num_kv_heads * parts * head_dim))
                pair = [arith.addf(x, _load(qkv, arith.addi(at, constant(i)))) for x, i in zip(pair, (0, half), strict=True)]
            if sums:
                pair = [_rounded(x) for x in pair]
            if scaling_refs:
                row_scale = _spread(_load(scaling_refs[0], token, 1))
                scales = [_load(scaling_refs[1], arith.addi(inside, constant(i))) for i in (0, half)]
                pair = [arith.mulf(arith.mulf(x, row_scale), scale) for x, scale in zip(pair, scales, strict=True)]
            first, second = pair
            if gain_refs:
                both = [[_load(ref, arith.addi(column, constant(i))) for i in (0, half)] for ref in gain_refs]
                gain = [arith.select(is_query, *of_half) for of_half in zip(*both, strict=True)]
                first, second = _normed(pair, gain, head_dim, eps, offset)
            c, s = (_load(x, arith.addi(_times(token, half), column)) for x in (cos, sin))
            turned = [
                arith.subf(arith.mulf(first, c), arith.mulf(second, s)),
                arith.addf(arith.mulf(second, c), arith.mulf(first, s)),
            ]
            with mgpu.when(arith.andi(is_one, is_query)):
                row = arith.addi(_times(arith.addi(_times(token, num_kv_heads), kv_head), parts - 2), part)
                _store(turned, q, row, column, head_dim)
            has_place = arith.andi(is_below(constant(parts - 3), part), is_below(slot, constant(num_slots)))
            with mgpu.when(arith.andi(is_one, has_place)):
                row = arith.addi(_times(kv_head, 2), arith.subi(part, constant(parts - 2)))
                row = arith.addi(_times(slot, 2 * num_kv_heads), row)
                _store([arith.select(is_value, *both) for both in zip(pair, turned, strict=True)], pool, row, column, head_dim)

        first = arith.addi(_times(place, THREADS), thread_index())
        for start in range(0, units, THREADS * blocks):
            turn_unit(arith.addi(first, constant(start)))

    arrays = (qkv, cos, sin, q, pool, *scaling, *gains)
    plgpu.inline_mgpu(arg_types=(SCALAR,) * 3 + (plgpu.RefType(),) * len(arrays))(turn)(token, slot, place, *arrays)


def _normed(pair: list[Any], gain: list[Any], head_dim: int, eps: float, offset: float) -> list[Any]:
    """Times what makes the mean of the head's squares 1, and times its gain. Neighbouring threads have the rest of the head."""
    f32 = ir.F32Type.get()
    squares = arith.addf(*(arith.mulf(x, x) for x in pair))
    total = vector.reduction(f32, vector.CombiningKind.ADD, squares)
    distance = 1
    while distance < head_dim // 2 // VECTOR:
        total = arith.addf(total, mgpu.shfl_bfly(total, distance))
        distance *= 2
    mean = arith.addf(arith.mulf(total, mgpu.c(1 / head_dim, f32)), mgpu.c(eps, f32))
    scale = _spread(mlir_math.rsqrt(mean))
    shift = _spread(mgpu.c(offset, f32))
    return [arith.mulf(arith.mulf(x, scale), arith.addf(g, shift)) for x, g in zip(pair, gain, strict=True)]


def _rounded(x: Any) -> Any:
    """To bfloat16, as XLA leaves a sum of parts."""
    return arith.extf(x.type, arith.truncf(ir.VectorType.get((VECTOR,), ir.BF16Type.get()), x))


def _spread(x: Any) -> Any:
    return vector.broadcast(ir.VectorType.get((VECTOR,), x.type), x)


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
