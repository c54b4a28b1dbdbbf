"""Latent attention for Hopper: rows that are key and value in one are read into shared memory once. Knows arrays and a work list.

Persistent thread blocks hold a producer warpgroup (queries, and page-indexed bulk copies into a ring of blocks) and two compute
warpgroups. Both compute the logits of a tile of 64 query rows (the heads of one token or of several) with a block of 64 tokens,
and each the values' columns of its half: an accumulator of 64 x 512 is more than one has registers for. A row's splits are
merged by the last to arrive, each half by itself (flash decoding; Dao et al. 2023).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_latent_items import Item, decode_item, prefill_item
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_latent_registers import mask_columns, merge_columns
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK, DecodePlan, PrefillPlan
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_registers import arrive, store_row_values, store_rows
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import LOG2E, LOW, ROWS, box_index, tiles

plgpu: Any = _mosaic_gpu  # not typed


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Sizes of the kernel.

    Attributes:
        stages: blocks of latents in shared memory.
        ctas: persistent thread blocks, one a multiprocessor.
        registers: of a producer and of a compute thread; first + 2 * second <= 504, what a block of 384 threads starts with.
    """

    stages: int = 2
    ctas: int = 132
    registers: tuple[int, int] = (40, 232)


def check_latent(q: jax.Array, pages: jax.Array, value_dim: int) -> None:
    """Raises NotImplementedError for shapes and types that the kernel does not serve."""
    num_heads, key_dim = q.shape[-2:]
    page_size = pages.shape[1]
    if key_dim % 64 or key_dim > 576 or value_dim % 128 or value_dim > 512:
        raise NotImplementedError(
            f"latent keys must be a multiple of 64 up to 576 and values of 128 up to 512; got {key_dim}, {value_dim}"
        )
    if num_heads > ROWS and num_heads % -(-num_heads // ROWS):
        raise NotImplementedError(f"{num_heads} query heads are no whole tiles of at most {ROWS}")
    if page_size not in (16, 32, 64, 128, 256):
        raise NotImplementedError(f"page_size must be 16, 32, 64, 128 or 256; got {page_size}")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or pages.dtype != q.dtype:
        raise NotImplementedError(f"latents must be bfloat16 or float16 like the queries; got {pages.dtype} and {q.dtype}")
    if q.size >= 2**31:
        raise NotImplementedError(f"offsets are 32 bit; got {q.size} elements of queries")


def seat_rows(num_heads: int) -> tuple[int, int]:
    """Tiles that the heads of a token take, and rows of each: a multiple of 8, as bulk copies want."""
    count = -(-num_heads // ROWS)
    return count, -(-(num_heads // count) // 8) * 8


def attend(
    q: Float[Array, "T tiles rows H"],
    latents: Float[Array, "pages page_size H"],
    page_tables: Int[Array, "B P"],
    plan: DecodePlan | PrefillPlan,
    *,
    scale: float,
    value_dim: int,
    out: Any = None,
    config: LatentConfig | None = None,
) -> jax.Array | None:
    """Causal attention of the tokens in `plan`.

    Args:
        q: queries, packed; in decode row b's token is q[b]. Each tile has the rows of seat_rows.
        latents: one layer's pool: keys, whose first value_dim numbers are the value.
        page_tables: pages of each row.
        plan: made by plan_decode with two kv heads a tile, or by plan_prefill with a head for each tile of ROWS rows in one of TILE
            tokens.
        scale: factor on q . k.
        out: a jax.Ref [T, tiles, rows, value_dim] to write to, other tokens untouched; None returns a new array, whose other
            tokens are undefined.
        config: None chooses.
    """
    config = config or LatentConfig()
    num_tokens, num_tiles, rows, key_dim = q.shape
    is_decode = isinstance(plan, DecodePlan)
    per_tile = 1 if is_decode else ROWS // rows
    flat = q.reshape(-1, key_dim)
    flat = jnp.pad(flat, ((0, max(per_tile * rows - flat.shape[0], 0)), (0, 0)))  # a bulk copy takes a whole tile
    box = min(latents.shape[1], BLOCK)  # tokens of one bulk copy; a page larger than a block is several
    boxes = latents.reshape(-1, box, key_dim)
    max_splits = plan.max_splits if isinstance(plan, DecodePlan) else 1
    slots = page_tables.shape[0] * max_splits * num_tiles
    if slots * rows * value_dim >= 2**31:
        raise NotImplementedError("offsets are 32 bit: 2**31 or more elements of partial results")
    parts_type = (
        [
            jax.ShapeDtypeStruct((slots, rows, value_dim), jnp.float32),
            jax.ShapeDtypeStruct((slots, 2, rows), jnp.float32),  # of each half
        ]
        if max_splits > 1
        else []
    )
    out_type = [] if out is not None else [jax.ShapeDtypeStruct((num_tokens, num_tiles, rows, value_dim), q.dtype)]
    body = _Body(
        config=config, num_tiles=num_tiles, rows=rows, per_tile=per_tile, max_splits=max_splits, factor=scale,
        page_size=latents.shape[1], value_dim=value_dim, is_decode=is_decode,
    )  # fmt: skip
    operands: list[Any] = [flat, boxes, page_tables, plan.items, plan.num_items]
    operands += [plan.arrivals] if isinstance(plan, DecodePlan) and max_splits > 1 else []
    operands += [out] if out is not None else []

    def latent_attention(*refs: Any) -> None:
        it = iter(refs)
        inputs = [next(it) for _ in range(5)]
        arrivals = next(it) if max_splits > 1 else None
        out_ref = next(it)  # the last operand or the first result: they are neighbours
        parts, lse = (next(it), next(it)) if max_splits > 1 else (None, None)
        body(*[*inputs, arrivals, out_ref, parts, lse, *it])

    latent_attention.__name__ = "latent_decode" if is_decode else "latent_prefill"  # as profiles name it

    wide = tiles(key_dim, 2)
    results = plgpu.kernel(
        latent_attention,
        out_type=[*out_type, *parts_type],
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=[
            plgpu.SMEM((1, ROWS, key_dim), q.dtype, transforms=wide),
            plgpu.SMEM((config.stages, BLOCK, key_dim), q.dtype, transforms=wide),
            plgpu.SMEM((2,), jnp.int32),  # arrive()'s values
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=BLOCK // box, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(*operands)
    return None if out is not None else results[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """The kernel's body and its static parameters."""

    config: LatentConfig
    num_tiles: int
    rows: int
    per_tile: int
    max_splits: int
    factor: float
    page_size: int
    value_dim: int
    is_decode: bool

    def __call__(
        self, q: Any, kv: Any, tables: Any, items: Any, num_items: Any, arrivals: Any, out: Any, parts: Any, lse: Any, qs: Any,
        ring: Any, box: Any, q_full: Any, q_free: Any, full: Any, free: Any, both: Any,
    ) -> None:  # fmt: skip
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        ctas = self.config.ctas
        per_entry = self.num_tiles if self.is_decode else 1  # a prefill's list has every tile in it

        def place(n: jax.Array) -> jax.Array:
            """Dealt back and forth: items come by falling size, so the sums stay even."""
            return jnp.where(lax.rem(n, 2) == 0, cta, ctas - 1 - cta)

        def mine() -> jax.Array:
            """How many items are this block's. Each warpgroup computes it anew: kept from before they part, it is spilled."""
            total = num_items[0] * per_entry
            rounds = lax.div(total, ctas)
            return rounds + jnp.where(place(rounds) < lax.rem(total, ctas), 1, 0)

        seats = {"num_tiles": self.num_tiles, "rows": self.rows}

        def item(n: jax.Array) -> Item:
            """This block's n-th item."""
            i = jnp.minimum(n * ctas + place(n), items.shape[0] * per_entry - 1)
            return decode_item(items, i, **seats) if self.is_decode else prefill_item(items, i, **seats, per_tile=self.per_tile)

        @pl.when(wg == 2)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[0], action="decrease")
            self.copy(mine(), item, q, kv, tables, qs, ring, q_full, q_free, full, free)

        @pl.when(wg < 2)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[1], action="increase")
            self.compute(wg, mine(), item, arrivals, out, parts, lse, qs, ring, box, q_full, q_free, full, free, both)

    def copy(
        self, mine: Any, item: Any, q: Any, kv: Any, tables: Any, qs: Any, ring: Any, q_full: Any, q_free: Any, full: Any, free: Any
    ) -> None:  # fmt: skip
        """The producer: each item's queries and pages."""
        stages, box = self.config.stages, kv.shape[1]
        used = self.per_tile * self.rows
        if used < ROWS:  # the idle rows stay finite
            for col in range(0, qs.shape[2], 64):
                qs[0, :, pl.ds(col, 64)] = plgpu.layout_cast(jnp.zeros((ROWS, 64), qs.dtype), plgpu.Layout.WGMMA)
            plgpu.commit_smem()

        def copy_item(n: jax.Array, t: jax.Array) -> Any:
            it = item(n)

            def copy_block(j: jax.Array, t: jax.Array) -> Any:
                slot = lax.rem(t, stages)
                base = it.lo + j * BLOCK
                ids = [
                    box_index(kv, tables, it.row, base + p * box, it.hi, page_size=self.page_size, visible=None)
                    for p in range(BLOCK // box)
                ]

                @pl.when(t >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                for p, index in enumerate(ids):
                    plgpu.copy_gmem_to_smem(kv.at[index], ring.at[slot, pl.ds(p * box, box)], full.at[slot])
                return t + 1

            blocks = it.blocks
            t = lax.fori_loop(0, jnp.minimum(blocks, 1), copy_block, t)  # while the queries before are in use

            @pl.when(n > 0)
            def _() -> None:
                plgpu.barrier_wait(q_free)

            start = pl.multiple_of(it.seat * self.rows, 8)
            plgpu.copy_gmem_to_smem(q.at[pl.ds(start, used)], qs.at[0, pl.ds(0, used)], q_full)
            return lax.fori_loop(1, blocks, copy_block, t)

        t = lax.fori_loop(0, mine, copy_item, jnp.int32(0))

        @pl.loop(jnp.maximum(t - stages, 0), t)
        def _(t: jax.Array) -> None:  # the interpreter wants every arrival waited for
            plgpu.barrier_wait(free.at[lax.rem(t, stages)])

        @pl.when(mine > 0)
        def _() -> None:
            plgpu.barrier_wait(q_free)

    def compute(
        self, half: Any, mine: Any, item: Any, arrivals: Any, out: Any, parts: Any, lse: Any, qs: Any, ring: Any, box: Any,
        q_full: Any, q_free: Any, full: Any, free: Any, both: Any,
    ) -> None:  # fmt: skip
        """Attention of each item's query rows over its tokens, half of the values' columns."""
        layout = plgpu.Layout.WGMMA
        stages, rows = self.config.stages, self.rows
        dim, width = self.value_dim, self.value_dim // 2
        scale = LOG2E * self.factor  # of logits in base 2

        def attend_block(j: jax.Array, carry: Any, it: Item, blocks: jax.Array) -> Any:
            acc, top, total, t = carry
            slot = lax.rem(t, stages)
            base = it.lo + j * BLOCK

            # 1. Logits of 64 tokens.
            plgpu.barrier_wait(full.at[slot])

            def logits(ref: Any) -> Any:
                # min(t, 0) is 0, unknown to the compiler: it keeps what describes a tile that never moves in registers, and spills.
                plgpu.wgmma(ref, qs.at[jnp.minimum(t, 0)], ring.at[slot].transpose((1, 0)))
                return ref[...]

            x = pl.run_scoped(logits, plgpu.ACC((ROWS, BLOCK), jnp.float32))

            @pl.when(j == blocks - 1)
            def _() -> None:
                plgpu.barrier_arrive(q_free)

            left = it.hi - base
            x = mask_columns(x, it.position + 1 - base, left, rows=rows)

            # 2. Online softmax, to base 2.
            high = jnp.maximum(top, x.max(axis=1) * scale)
            shrink = jnp.exp2(top - high)
            p = jnp.exp2(x * scale - lax.broadcast_in_dim(high, x.shape, [0]))
            total = total * shrink + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            p = p.astype(qs.dtype)

            # 3. Weighted values.
            @pl.when(left < BLOCK)
            def _() -> None:  # slots past the row's end may hold anything, and 0 * NaN is NaN
                plgpu.barrier_arrive(both)  # they are keys of the other warpgroup, too
                plgpu.barrier_wait(both)
                for col in range(0, width, 64):
                    part = ring.at[slot, :, pl.ds(half * width + col, 64)]
                    v = plgpu.load(part, layout=layout)
                    place = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=layout)
                    part[...] = jnp.where(place < left, v, jnp.zeros_like(v))
                plgpu.commit_smem()

            def add_values(ref: Any) -> None:
                plgpu.wgmma(ref, p, ring.at[slot, :, pl.ds(half * width, width)])

            acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(free.at[slot])
            return acc, high, total, t + 1

        def attend_item(n: jax.Array, t: jax.Array) -> Any:
            it = item(n)
            blocks = it.blocks
            acc = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), layout)
            top = plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), layout.reduce(1))
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
            plgpu.barrier_wait(q_full)

            @pl.when(blocks == 0)
            def _() -> None:
                plgpu.barrier_arrive(q_free)

            # 1. The blocks.
            step = functools.partial(attend_block, it=it, blocks=blocks)
            acc, top, total, t = lax.fori_loop(0, blocks, step, (acc, top, total, t))
            acc = acc * lax.broadcast_in_dim(jnp.where(total > 0, 1.0 / total, 0.0), acc.shape, [0])

            # 2. The result, or a part of it; the last part of a row to come merges them all.
            base = it.seat * (rows * dim) + half * width

            @pl.when(it.count == 1)
            def _() -> None:
                store_rows(acc, out, base + it.first * dim, it.first, it.size, stride=dim)

            if parts is not None:

                @pl.when(it.count > 1)
                def _() -> None:
                    first = it.row * (self.max_splits * self.num_tiles) + it.tile
                    slot = first + it.split * self.num_tiles
                    everything = jnp.int32(0), jnp.int32(rows)
                    store_rows(acc, parts, slot * (rows * dim) + half * width, *everything, stride=dim)
                    store_row_values(top + jnp.log2(total), lse, (2 * slot + half) * rows, *everything)
                    index = 2 * it.seat + half
                    arrived = arrive(arrivals, index, box, half)

                    @pl.when(arrived == it.count - 1)
                    def _() -> None:
                        merge_columns(
                            parts, lse, arrivals, out, first, it.count, index, base, half, rows=rows, stride=self.num_tiles
                        )

            return t

        lax.fori_loop(0, mine, attend_item, jnp.int32(0))
