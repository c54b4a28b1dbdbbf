"""Paged decode attention for Hopper: one query token a row. Lays out the operands; knows arrays and a DecodePlan only."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_decode_kernel import DecodeConfig, DecodeKernel, scratch
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK, DecodePlan
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import LOG2E, ROWS, check_decode, group_rows

plgpu: Any = _mosaic_gpu  # not typed


def choose_config(head_dim: int, num_bits: int) -> DecodeConfig:
    """The sizes that measured best on an H100 (bench/NOTES.md)."""
    if num_bits == 8:
        if head_dim <= 128:
            return DecodeConfig(stages=4, registers=(88, 168))
        return DecodeConfig(stages=3, pairs=1, registers=(104, 248))
    return {64: DecodeConfig(stages=6), 128: DecodeConfig(stages=2), 256: DecodeConfig(pairs=1, registers=(40, 248))}[head_dim]


def decode(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages page_size 2*K H"],
    page_tables: Int[Array, "B P"],
    plan: DecodePlan,
    sinks: Float[Array, " N"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Any = None,
    config: DecodeConfig | None = None,
) -> jax.Array | None:
    """Attention of query token b over row b, for the rows that `plan` has items for.

    Args:
        q: queries; row b's token is q[b].
        kv_pages: one layer's pool, in q's type or float8_e4m3fn.
        page_tables: pages of each row.
        plan: made by plan_decode for these rows and this page table width; it holds the window.
        sinks: a logit for each head that only adds to the softmax's denominator.
        scale: factor on q . k.
        softcap: logits become softcap * tanh(logits / softcap).
        k_scale: keys are k_scale times the stored values.
        v_scale: values are v_scale times the stored values.
        out: a jax.Ref [T, N, H] to write to, other rows untouched; None returns a new array, whose other rows are undefined.
        config: None chooses.

    Raises:
        NotImplementedError: see check_decode.
    """
    check_decode(q, kv_pages)
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads = kv_pages.shape[2] // 2
    config = config or choose_config(head_dim, kv_pages.dtype.itemsize * 8)
    compute_type = jnp.float16 if kv_pages.dtype.itemsize == 1 else q.dtype  # Hopper converts e4m3 to f16 alone
    rows = num_heads // num_kv_heads

    padded = not (8 % rows == 0 and num_heads % 8 == 0)
    if padded:
        q = q[: page_tables.shape[0]]
    grouped, per_chunk = group_rows(q.astype(compute_type), num_kv_heads)
    sink_rows = None
    if sinks is not None:
        sink_rows, _ = group_rows(sinks.astype(jnp.float32)[None] * LOG2E, num_kv_heads)
        sink_rows = jnp.pad(sink_rows[0], ((0, 0), (0, ROWS - sink_rows.shape[2])))
        if plan.seats > 1:  # and those of a tile of several requests, for each kv head
            shared = jnp.tile((sinks.astype(jnp.float32) * LOG2E).reshape(num_kv_heads, rows), (1, plan.seats))
            sink_rows = jnp.concatenate([sink_rows, jnp.pad(shared, ((0, 0), (0, ROWS - shared.shape[1])))])

    pages, page_size, _, _ = kv_pages.shape
    box = min(page_size, BLOCK)  # tokens of one bulk copy; a page larger than a block is several
    boxes = kv_pages.reshape(pages * (page_size // box), box, 2 * num_kv_heads, head_dim)
    slots = page_tables.shape[0] * plan.max_splits * num_kv_heads
    splits = plan.max_splits > 1
    parts_type = (
        [
            jax.ShapeDtypeStruct((slots, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((slots, rows), jnp.float32),
        ]
        if splits
        else []
    )
    if slots * rows * head_dim >= 2**31 or (out.size if out is not None else q.size) >= 2**31:
        raise NotImplementedError("offsets are 32 bit: 2**31 or more elements of partial results or queries")

    out_type = [] if out is not None else [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    body = DecodeKernel(
        config=config,
        rows=rows,
        per_chunk=per_chunk,
        max_splits=plan.max_splits,
        factor=scale * k_scale,
        softcap=softcap,
        v_scale=v_scale,
        windowed=plan.window is not None,
        has_sinks=sinks is not None,
        page_size=page_size,
        seats=plan.seats,
    )
    operands: list[Any] = [grouped, boxes, page_tables, plan.items, plan.num_items, plan.arrivals]
    operands += [plan.shared_rows, plan.num_splits] if plan.seats > 1 else []
    operands += [sink_rows] if sinks is not None else []
    operands += [out] if out is not None else []

    def paged_decode(*refs: Any) -> None:
        it = iter(refs)
        inputs = [next(it) for _ in range(6)]
        sharing = (next(it), next(it)) if plan.seats > 1 else None
        sink_ref = next(it) if sinks is not None else None
        out_ref = next(it)  # the last operand or the first result: they are neighbours
        parts, lse = (next(it), next(it)) if splits else (None, None)
        body(*inputs, sharing, sink_ref, out_ref, parts, lse, *it)

    results = plgpu.kernel(
        paged_decode,
        out_type=[*out_type, *parts_type],
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=2 * config.pairs,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=scratch(config, head_dim, box, kv_pages.dtype, compute_type, plan.seats),
    )(*operands)
    return None if out is not None else results[0]
