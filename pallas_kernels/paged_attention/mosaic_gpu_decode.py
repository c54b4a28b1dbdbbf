"""Paged decode attention for Hopper: one query token a row, every key and value read once. Knows arrays and a DecodePlan only.

132 persistent thread blocks hold one or two pairs of a producer warpgroup (page-indexed bulk copies into a ring of stages)
and a compute warpgroup (two wgmmas and the online softmax). The G query heads of a kv head fill the first of wgmma's 64 rows.
Each item of the plan gives a partial result and its log-sum-exp; the last of a row's splits to finish merges them
(flash decoding; Dao et al. 2023). Sizes are data: one compiled program serves every mix of lengths.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK, DecodePlan
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_registers import (
    arrive,
    merge_partials,
    store_row_values,
    store_rows,
)

plgpu: Any = _mosaic_gpu  # not typed

LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup's wgmma
LOW = -1e30  # a running maximum starts here: -inf minus -inf would be NaN


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Sizes of the kernel.

    Attributes:
        stages: blocks of K and of V in shared memory, for each compute warpgroup.
        pairs: compute warpgroups of a thread block, each with a producer, a ring and a work list of its own.
        ctas: persistent thread blocks, one a multiprocessor.
        registers: of a producer and of a compute thread; pairs * 128 * sum <= 65536.
    """

    stages: int = 3
    pairs: int = 2
    ctas: int = 132
    registers: tuple[int, int] = (40, 208)


def choose_config(head_dim: int, num_bits: int) -> DecodeConfig:
    """The sizes that measured best on an H100 (bench/NOTES.md)."""
    if num_bits == 8:
        if head_dim <= 128:
            return DecodeConfig(stages=4, registers=(88, 168))
        return DecodeConfig(stages=3, pairs=1, registers=(104, 248))
    return {64: DecodeConfig(stages=6), 128: DecodeConfig(), 256: DecodeConfig(pairs=1, registers=(40, 248))}[head_dim]


def check_decode(q: jax.Array, kv_pages: jax.Array) -> None:
    """Raises NotImplementedError for shapes and types that the kernel does not serve."""
    num_heads, head_dim = q.shape[-2:]
    _, page_size, kv_heads, _ = kv_pages.shape
    if head_dim not in (64, 128, 256):
        raise NotImplementedError(f"head_dim must be 64, 128 or 256; got {head_dim}")
    if num_heads % (kv_heads // 2) or num_heads // (kv_heads // 2) > ROWS:
        raise NotImplementedError(f"{num_heads} query heads over {kv_heads // 2} kv heads; at most {ROWS} a kv head")
    if page_size not in (16, 32, 64, 128, 256):
        raise NotImplementedError(f"page_size must be 16, 32, 64, 128 or 256; got {page_size}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries must be bfloat16 or float16; got {q.dtype}")
    if kv_pages.dtype != q.dtype and kv_pages.dtype != jnp.float8_e4m3fn:
        raise NotImplementedError(f"pages must be {q.dtype} like the queries or float8_e4m3fn; got {kv_pages.dtype}")


def _group_rows(x: jax.Array, num_kv_heads: int) -> tuple[jax.Array, int]:
    """[B, N, ...] -> ([B, chunks, rows, ...], kv heads a chunk); rows are a multiple of 8, as a bulk copy into a tile wants.

    A plain reshape if G divides 8 or 8 divides G: a chunk then holds the heads of 8 / G kv heads, and the other heads' rows
    are harmless. Else each kv head's rows are padded.
    """
    num, heads, *rest = x.shape
    group = heads // num_kv_heads
    if 8 % group == 0 and heads % 8 == 0:
        return x.reshape(num, heads // 8, 8, *rest), 8 // group
    x = x.reshape(num, num_kv_heads, group, *rest)
    return jnp.pad(x, [(0, 0), (0, 0), (0, -group % 8), *[(0, 0)] * len(rest)]), 1


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
    grouped, per_chunk = _group_rows(q.astype(compute_type), num_kv_heads)
    sink_rows = None
    if sinks is not None:
        sink_rows, _ = _group_rows(sinks.astype(jnp.float32)[None] * LOG2E, num_kv_heads)
        sink_rows = jnp.pad(sink_rows[0], ((0, 0), (0, ROWS - sink_rows.shape[2])))

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
    body = _Body(
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
    )
    operands: list[Any] = [grouped, boxes, page_tables, plan.items, plan.num_items, plan.arrivals]
    operands += [sink_rows] if sinks is not None else []
    operands += [out] if out is not None else []

    def paged_decode(*refs: Any) -> None:
        it = iter(refs)
        inputs = [next(it) for _ in range(6)]
        sink_ref = next(it) if sinks is not None else None
        out_ref = next(it)  # the last operand or the first result: they are neighbours
        parts, lse = (next(it), next(it)) if splits else (None, None)
        body(*inputs, sink_ref, out_ref, parts, lse, *it)

    results = plgpu.kernel(
        paged_decode,
        out_type=[*out_type, *parts_type],
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=2 * config.pairs,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=_scratch(config, head_dim, box, kv_pages.dtype, compute_type),
    )(*operands)
    return None if out is not None else results[0]


def tiles(head_dim: int, itemsize: int) -> tuple[Any, Any]:
    """The layout in shared memory of rows of `head_dim` numbers: 128 bytes wide, as wgmma and bulk copies want it, or a row."""
    width = min(128 // itemsize, head_dim)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * itemsize)


def _scratch(config: DecodeConfig, head_dim: int, box: int, page_type: Any, compute_type: Any) -> list[Any]:
    narrow = jnp.dtype(page_type).itemsize == 1
    pairs, stages = config.pairs, config.pairs * config.stages
    wide = tiles(head_dim, 2)
    ring = plgpu.SMEM((stages, BLOCK, head_dim), page_type, transforms=tiles(head_dim, jnp.dtype(page_type).itemsize))
    arrivals = BLOCK // box
    return [
        plgpu.SMEM((pairs, ROWS, head_dim), compute_type, transforms=wide),  # queries
        ring,  # keys
        ring,  # values
        plgpu.SMEM((2 * pairs, BLOCK, head_dim), compute_type, transforms=wide) if narrow else None,  # widened K, V
        plgpu.SMEM((pairs,), jnp.int32),  # arrive()'s value
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=2 * pairs) if narrow else None,
        plgpu.Barrier(num_barriers=2 * pairs) if narrow else None,
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """The kernel's body and its static parameters."""

    config: DecodeConfig
    rows: int
    per_chunk: int
    max_splits: int
    factor: float
    softcap: float | None
    v_scale: float
    windowed: bool
    has_sinks: bool
    page_size: int

    def __call__(self, q: Any, kv: Any, tables: Any, items: Any, num_items: Any, *refs: Any) -> None:
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        pairs = self.config.pairs
        pair = lax.rem(wg, pairs)
        worker = pair * self.config.ctas + cta  # neighbouring items go to different multiprocessors
        num_workers = pairs * self.config.ctas
        num_kv_heads = kv.shape[2] // 2
        mine = lax.div(num_items[0] * num_kv_heads - worker + (num_workers - 1), num_workers)

        def item(n: jax.Array) -> tuple[jax.Array, ...]:
            """row, kv head, first token, last token + 1, split, splits, first visible token of this worker's n-th item."""
            i = jnp.minimum(worker + n * num_workers, items.shape[0] * num_kv_heads - 1)
            j = lax.div(i, num_kv_heads)
            row, lo, hi, split, count, visible = (items[j, f] for f in range(6))
            return row, lax.rem(i, num_kv_heads), lo, hi, split, count, visible

        @pl.when(wg >= pairs)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[0], action="decrease")
            self.produce(pair, mine, item, kv, tables, *refs)

        @pl.when(wg < pairs)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[1], action="increase")
            self.compute(pair, mine, item, q, kv, *refs)

    def produce(
        self, pair: Any, mine: Any, item: Any, kv: Any, tables: Any, _arrivals: Any, _sinks: Any, _out: Any, _parts: Any,
        _lse: Any, _qs: Any, ks: Any, vs: Any, wide: Any, _box: Any, _q_full: Any, k_full: Any, v_full: Any,
        k_free: Any, v_free: Any, wide_full: Any, wide_free: Any,
    ) -> None:  # fmt: skip
        """Copies the pages of each item into the ring; 8-bit pages it also widens to 16 bits, as wgmma wants them."""
        stages = self.config.stages
        num_boxes, box = kv.shape[0], kv.shape[1]
        per_page = self.page_size // box
        narrow = wide is not None

        def widen(t: jax.Array) -> None:
            slot = pair * stages + lax.rem(t, stages)
            for v, (ring, full) in enumerate(((ks, k_full), (vs, v_full))):
                plgpu.barrier_wait(full.at[slot])
                x = plgpu.load(ring.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)

                @pl.when(t > 0)
                def _(v: int = v) -> None:
                    plgpu.barrier_wait(wide_free.at[2 * pair + v])

                wide[2 * pair + v] = x.astype(wide.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(wide_full.at[2 * pair + v])

        def copy_item(n: jax.Array, t: jax.Array) -> Any:
            row, head, lo, hi, _, _, visible = item(n)

            def copy_block(j: jax.Array, t: jax.Array) -> Any:
                slot = pair * stages + lax.rem(t, stages)
                base = lo + j * BLOCK

                def index_of(p: int) -> jax.Array:
                    token = base + p * box
                    wanted = token < hi
                    if self.windowed:  # pages before the window may be gone
                        wanted &= token + box > visible
                    page = tables[row, lax.div(jnp.where(wanted, token, hi - 1), self.page_size)]
                    index = page * per_page + lax.div(lax.rem(token, self.page_size), box)
                    return jnp.where(wanted, index, num_boxes)  # out of bounds: filled with zeros

                def copy(v: int, p: int, index: jax.Array) -> None:
                    ring, full = ((ks, k_full), (vs, v_full))[v]
                    at = ring.at[slot, pl.ds(p * box, box)]
                    plgpu.copy_gmem_to_smem(kv.at[index, :, 2 * head + v], at, full.at[slot])

                if narrow:  # page by page: all their indices at once spill
                    for p in range(BLOCK // box):
                        index = index_of(p)
                        copy(0, p, index)
                        copy(1, p, index)
                else:
                    ids = [index_of(p) for p in range(BLOCK // box)]
                    for v, free in enumerate((k_free, v_free)):

                        @pl.when(t >= stages)
                        def _(free: Any = free) -> None:
                            plgpu.barrier_wait(free.at[slot])

                        for p, index in enumerate(ids):
                            copy(v, p, index)
                if narrow:  # widened `stages - 1` blocks later, when the copy has arrived

                    @pl.when(t >= stages - 1)
                    def _() -> None:
                        widen(t - (stages - 1))

                return t + 1

            return lax.fori_loop(0, lax.div(hi - lo + (BLOCK - 1), BLOCK), copy_block, t)

        t = lax.fori_loop(0, mine, copy_item, jnp.int32(0))
        if narrow:

            @pl.loop(jnp.maximum(t - (stages - 1), 0), t)
            def _(t: jax.Array) -> None:
                widen(t)

    def compute(
        self, pair: Any, mine: Any, item: Any, q: Any, kv: Any, arrivals: Any, sinks: Any, out: Any, parts: Any, lse: Any,
        qs: Any, ks: Any, vs: Any, wide: Any, box: Any, q_full: Any, k_full: Any, v_full: Any, k_free: Any, v_free: Any,
        wide_full: Any, wide_free: Any,
    ) -> None:  # fmt: skip
        """Attention of each item's query rows over its tokens."""
        layout = plgpu.Layout.WGMMA
        stages, rows = self.config.stages, self.rows
        num_kv_heads, dim = kv.shape[2] // 2, kv.shape[3]
        compute_type = qs.dtype
        scale = LOG2E * (self.factor if self.softcap is None else self.softcap)  # of logits in base 2

        qs[pair] = plgpu.layout_cast(jnp.zeros((ROWS, dim), compute_type), layout)  # the idle rows stay finite
        plgpu.commit_smem()

        def load_queries(row: jax.Array, head: jax.Array) -> None:
            at = qs.at[pair, pl.ds(0, q.shape[2])]
            plgpu.copy_gmem_to_smem(q.at[row, lax.div(head, self.per_chunk)], at, q_full.at[pair])

        def attend(j: jax.Array, carry: Any, lo: Any, hi: Any, visible: Any, masked: bool) -> Any:
            acc, top, total, t = carry
            slot = pair * stages + lax.rem(t, stages)
            k_tile, k_ready, k_done = ks.at[slot], k_full.at[slot], k_free.at[slot]
            v_tile, v_ready, v_done = vs.at[slot], v_full.at[slot], v_free.at[slot]
            if wide is not None:
                k_tile, k_ready, k_done = wide.at[2 * pair], wide_full.at[2 * pair], wide_free.at[2 * pair]
                v_tile, v_ready, v_done = wide.at[2 * pair + 1], wide_full.at[2 * pair + 1], wide_free.at[2 * pair + 1]

            # 1. Logits of 64 tokens.
            plgpu.barrier_wait(k_ready)

            def logits(ref: Any) -> Any:
                plgpu.wgmma(ref, qs.at[pair], k_tile.transpose((1, 0)))
                return ref[...]

            x = pl.run_scoped(logits, plgpu.ACC((ROWS, BLOCK), jnp.float32))
            plgpu.barrier_arrive(k_done)
            if self.softcap is not None:
                x = jnp.tanh(x * (self.factor / self.softcap))
            left = hi - lo - j * BLOCK
            if masked:
                column = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=layout)
                seen = column < left
                if self.windowed:
                    seen &= column >= visible - lo - j * BLOCK
                x = jnp.where(seen, x, -jnp.inf)

            # 2. Online softmax, to base 2.
            high = jnp.maximum(top, x.max(axis=1) * scale)
            shrink = jnp.exp2(top - high)
            p = jnp.exp2(x * scale - lax.broadcast_in_dim(high, x.shape, [0]))
            total = total * shrink + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            p = p.astype(compute_type)

            # 3. Weighted values.
            plgpu.barrier_wait(v_ready)
            if masked:

                @pl.when(left < BLOCK)
                def _() -> None:  # slots past the row's end may hold anything, and 0 * NaN is NaN
                    for col in range(0, dim, 64):  # 64 columns at a time, or head_dim 256 spills
                        v = plgpu.load(v_tile.at[:, pl.ds(col, 64)], layout=layout)
                        token = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=layout)
                        v_tile[:, pl.ds(col, 64)] = jnp.where(token < left, v, jnp.zeros_like(v))
                    plgpu.commit_smem()

            def add_values(ref: Any) -> None:
                plgpu.wgmma(ref, p, v_tile)

            acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_done)
            return acc, high, total, t + 1

        def settle(pending: tuple[Any, ...]) -> None:
            """Counts a stored partial result in; the last of its row's splits to be counted merges them all."""
            count, pair_index, base = pending

            @pl.when(count > 1)
            def _() -> None:
                arrived = arrive(arrivals, pair_index, box, pair)

                @pl.when(arrived == count - 1)
                def _() -> None:
                    merge_partials(
                        parts, lse, arrivals, out, base, count, pair_index, pair_index * (rows * dim),
                        rows=rows, stride=num_kv_heads,
                    )  # fmt: skip

        def attend_item(n: jax.Array, carry: Any) -> Any:
            t, (row, head, lo, hi, split, count, visible), pending = carry
            following = item(n + 1)  # read early: three dependent loads stand before its first copy
            acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), layout)
            if self.has_sinks:
                sink = plgpu.load(sinks.at[lax.div(head, self.per_chunk)], layout=layout.reduce(1), optimized=False)
                once = jnp.where(split == 0, 1.0, 0.0)  # in one split of the row
                top = sink * once + LOW * (1.0 - once)
                total = plgpu.layout_cast(jnp.full((ROWS,), 1.0, jnp.float32), layout.reduce(1)) * once
            else:
                top = plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), layout.reduce(1))
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
            plgpu.barrier_wait(q_full.at[pair])

            # 1. The blocks; only the last is masked, except under a window.
            step = functools.partial(attend, lo=lo, hi=hi, visible=visible)
            blocks = lax.div(hi - lo + (BLOCK - 1), BLOCK)
            plain = 0 if self.windowed else lax.div(hi - lo, BLOCK)
            state = (acc, top, total, t)
            if not self.windowed:
                state = lax.fori_loop(0, plain, functools.partial(step, masked=False), state)
            acc, top, total, t = lax.fori_loop(plain, blocks, functools.partial(step, masked=True), state)

            # 2. The next item's queries come while this one is stored.
            @pl.when(n + 1 < mine)
            def _() -> None:
                load_queries(*following[:2])

            acc = acc * lax.broadcast_in_dim(jnp.where(total > 0, self.v_scale / total, 0.0), acc.shape, [0])
            first = lax.rem(head, self.per_chunk) * rows
            pair_index = row * num_kv_heads + head

            # 3. A row of one split is finished. Another's partial result is counted in one item later, when its stores have
            #    long reached memory: the release would wait for them otherwise.
            if parts is None:
                store_rows(acc, out, pair_index * (rows * dim), first, jnp.int32(rows), stride=dim)
                return t, following, pending
            settle(pending)
            base = row * (self.max_splits * num_kv_heads) + head

            @pl.when(count == 1)
            def _() -> None:
                store_rows(acc, out, pair_index * (rows * dim), first, jnp.int32(rows), stride=dim)

            @pl.when(count > 1)
            def _() -> None:
                slot = base + split * num_kv_heads
                store_rows(acc, parts, slot * (rows * dim), first, jnp.int32(rows), stride=dim)
                store_row_values(top + jnp.log2(total), lse, slot * rows, first, jnp.int32(rows))

            return t, following, (count, pair_index, base)

        head_item = item(jnp.int32(0))

        @pl.when(mine > 0)
        def _() -> None:
            load_queries(*head_item[:2])

        nothing = (jnp.int32(0),) * 3
        _, _, pending = lax.fori_loop(0, mine, attend_item, (jnp.int32(0), head_item, nothing))
        if parts is not None:
            settle(pending)
