"""The kernel of paged decode attention for Hopper: every key and value is read once. Knows refs and a work list only.

132 persistent thread blocks hold one or two pairs of a producer warpgroup (page-indexed bulk copies into a ring of stages)
and a compute warpgroup (two wgmmas and the online softmax). The G query heads of a kv head fill the first of wgmma's 64 rows, or
those of up to 64 / G requests that share the item's pages (mosaic_gpu_sharing.py): that is then the one difference between items.
Workers take the items of the plan one by one, from a counter. Each gives a partial result and its log-sum-exp; the last of a
row's splits to finish merges them (flash decoding; Dao et al. 2023). Sizes are data: one compiled program serves every mix of
lengths.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_decode_pages import copy_pages, num_blocks
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_registers import (
    arrive,
    merge_partials,
    store_row_values,
    store_rows,
)
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import LOG2E, LOW, ROWS, tiles
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tile_rows import (
    arrive_for_rows,
    load_tile_rows,
    store_tile_row_values,
    store_tile_rows,
)

plgpu: Any = _mosaic_gpu  # not typed

Decorator = Callable[[Callable[[], Any]], Any]


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


def scratch(config: DecodeConfig, head_dim: int, box: int, page_type: Any, compute_type: Any, seats: int) -> list[Any]:
    """Shared memory and barriers: the last parameters of DecodeKernel.compute."""
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
        plgpu.SMEM((pairs * (seats + 1),), jnp.int32),  # values of arrive() and arrive_for_rows(), then those of take()
        plgpu.SMEM((stages,), jnp.int32),  # items, from a producer to its compute warpgroup
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=2 * pairs) if narrow else None,
        plgpu.Barrier(num_barriers=2 * pairs) if narrow else None,
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeKernel:
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
    seats: int

    def __call__(self, q: Any, kv: Any, tables: Any, items: Any, num_items: Any, *refs: Any) -> None:
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        pairs = self.config.pairs
        pair = lax.rem(wg, pairs)
        worker = pair * self.config.ctas + cta  # neighbouring items go to different multiprocessors
        num_kv_heads = kv.shape[2] // 2

        def total() -> Any:
            """How many items there are. Each warpgroup computes it anew: kept from before they part, it is spilled."""
            return num_items[0] * num_kv_heads

        def item(i: jax.Array) -> tuple[jax.Array, ...]:
            """row, kv head, first token, last token + 1, split, splits, first visible token, start of the rows in shared_rows and
            their number, of item i."""
            i = jnp.minimum(i, items.shape[0] * num_kv_heads - 1)
            j = lax.div(i, num_kv_heads)
            row, lo, hi, split, count, visible = (items[j, f] for f in range(6))
            shared = (items[j, 6], items[j, 7]) if self.seats > 1 else ()
            return row, lax.rem(i, num_kv_heads), lo, hi, split, count, visible, *shared

        @pl.when(wg >= pairs)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[0], action="decrease")
            sizes = {"stages": self.config.stages, "page_size": self.page_size, "workers": pairs * self.config.ctas}
            sizes["slot_of_pair"] = pairs * self.seats
            copy_pages(pair, worker, total(), item, kv, tables, *refs, **sizes, windowed=self.windowed)

        @pl.when(wg < pairs)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[1], action="increase")
            self.compute(pair, total(), item, q, kv, *refs)

    def compute(
        self, pair: Any, total_items: Any, item: Any, q: Any, kv: Any, arrivals: Any, sharing: Any, sinks: Any, out: Any,
        parts: Any, lse: Any, qs: Any, ks: Any, vs: Any, wide: Any, box: Any, dealt: Any, q_full: Any, k_full: Any, v_full: Any,
        k_free: Any, v_free: Any, dealt_full: Any, dealt_free: Any, wide_full: Any, wide_free: Any,
    ) -> None:  # fmt: skip
        """Attention of each item's query rows over its tokens."""
        layout = plgpu.Layout.WGMMA
        stages, rows = self.config.stages, self.rows
        num_kv_heads, dim = kv.shape[2] // 2, kv.shape[3]
        compute_type = qs.dtype
        scale = LOG2E * (self.factor if self.softcap is None else self.softcap)  # of logits in base 2

        qs[pair] = plgpu.layout_cast(jnp.zeros((ROWS, dim), compute_type), layout)  # the idle rows stay finite
        plgpu.commit_smem()

        def receive(n: jax.Array) -> jax.Array:
            """The n-th item that the producer took."""
            slot = pair * stages + lax.rem(n, stages)
            plgpu.barrier_wait(dealt_full.at[slot])
            i: jax.Array = dealt[slot]
            plgpu.barrier_arrive(dealt_free.at[slot])
            return i

        def alone(wanted: tuple[jax.Array, ...]) -> Decorator:
            """Runs a function if the item is of one row."""
            return pl.when(wanted[8] == 1) if self.seats > 1 else lambda f: f()

        def together(wanted: tuple[jax.Array, ...]) -> Decorator:
            """Runs a function if the item is of several rows."""
            return pl.when(wanted[8] > 1) if self.seats > 1 else lambda f: None

        def load_queries(wanted: tuple[jax.Array, ...]) -> None:
            row, head = wanted[:2]

            @alone(wanted)
            def _() -> None:
                at = qs.at[pair, pl.ds(0, q.shape[2])]
                plgpu.copy_gmem_to_smem(q.at[row, lax.div(head, self.per_chunk)], at, q_full.at[pair])

            @together(wanted)
            def _() -> None:
                base = (lax.div(head, self.per_chunk) * q.shape[2] + lax.rem(head, self.per_chunk) * rows) * dim
                stride = q.shape[1] * q.shape[2] * dim
                start, size = wanted[7:]
                qs[pair] = load_tile_rows(q, sharing[0], start, size, base, group=rows, stride=stride)
                plgpu.commit_smem()

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

        def merge(row: jax.Array, head: jax.Array, count: jax.Array) -> None:
            index = row * num_kv_heads + head
            merge_partials(
                parts, lse, arrivals, out, row * (self.max_splits * num_kv_heads) + head, count, index, index * (rows * dim),
                rows=rows, stride=num_kv_heads,
            )  # fmt: skip

        def settle(pending: tuple[Any, ...]) -> None:
            """Counts a stored partial result in; the last of its row's splits to be counted merges them all."""
            row, head, _, _, _, count, *_ = pending

            @pl.when(count > 1)
            def count_in() -> None:
                @alone(pending)
                def _() -> None:
                    arrived = arrive(arrivals, row * num_kv_heads + head, box, pair * self.seats)
                    pl.when(arrived == count - 1)(lambda: merge(row, head, count))

                @together(pending)
                def _() -> None:
                    shared_rows, num_splits = sharing
                    start, size = pending[7:]
                    first = pair * self.seats
                    arrive_for_rows(
                        arrivals, shared_rows, num_splits, start, size, head, box, first, stride=num_kv_heads
                    )  # fmt: skip

                    @pl.loop(0, size)
                    def _(i: jax.Array) -> None:
                        @pl.when(box[first + i] == 1)
                        def _() -> None:
                            row = shared_rows[start + i]
                            merge(row, head, num_splits[row])

        def attend_item(carry: Any) -> Any:
            n, i, t, current, pending = carry
            row, head, lo, hi, split, count, visible = current[:7]
            acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), layout)
            if self.has_sinks:
                sink_row = lax.div(head, self.per_chunk)
                if self.seats > 1:
                    sink_row = jnp.where(current[8] > 1, q.shape[1] + head, sink_row)
                sink = plgpu.load(sinks.at[sink_row], layout=layout.reduce(1), optimized=False)
                once = jnp.where(split == 0, 1.0, 0.0)  # in one split of the row
                top = sink * once + LOW * (1.0 - once)
                total = plgpu.layout_cast(jnp.full((ROWS,), 1.0, jnp.float32), layout.reduce(1)) * once
            else:
                top = plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), layout.reduce(1))
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
            alone(current)(lambda: plgpu.barrier_wait(q_full.at[pair]))

            # 1. The blocks; only the last is masked, except under a window.
            step = functools.partial(attend, lo=lo, hi=hi, visible=visible)
            blocks = num_blocks(lo, hi)
            plain = 0 if self.windowed else lax.div(hi - lo, BLOCK)
            state = (acc, top, total, t)
            if not self.windowed:
                state = lax.fori_loop(0, plain, functools.partial(step, masked=False), state)
            acc, top, total, t = lax.fori_loop(plain, blocks, functools.partial(step, masked=True), state)

            # 2. The next item's queries come while this one is stored.
            i = receive(n + 1)
            following = item(i)

            @pl.when(i < total_items)
            def _() -> None:
                load_queries(following)

            acc = acc * lax.broadcast_in_dim(jnp.where(total > 0, self.v_scale / total, 0.0), acc.shape, [0])
            first = lax.rem(head, self.per_chunk) * rows
            pair_index = row * num_kv_heads + head

            # 3. A row of one split is finished. Another's partial result is counted in one item later, when its stores have
            #    long reached memory: the release would wait for them otherwise.
            if parts is None:
                store_rows(acc, out, pair_index * (rows * dim), first, jnp.int32(rows), stride=dim)
                return n + 1, i, t, following, pending
            settle(pending)

            @pl.when(count == 1)
            def _() -> None:
                store_rows(acc, out, pair_index * (rows * dim), first, jnp.int32(rows), stride=dim)

            @pl.when(count > 1)
            def _() -> None:
                slot = split * num_kv_heads + head  # of the row's
                row_slots = self.max_splits * num_kv_heads
                logsumexp = top + jnp.log2(total)

                @alone(current)
                def _() -> None:
                    at = row * row_slots + slot
                    store_rows(acc, parts, at * (rows * dim), first, jnp.int32(rows), stride=dim)
                    store_row_values(logsumexp, lse, at * rows, first, jnp.int32(rows))

                @together(current)
                def _() -> None:
                    members, (start, size) = sharing[0], current[7:]
                    store_tile_rows(
                        acc, parts, members, start, size, slot * (rows * dim), group=rows, stride=row_slots * rows * dim
                    )
                    store_tile_row_values(logsumexp, lse, members, start, size, slot * rows, group=rows, stride=row_slots * rows)

            return n + 1, i, t, following, current

        zero = jnp.int32(0)
        first = receive(zero)
        head_item = item(first)

        @pl.when(first < total_items)
        def _() -> None:
            load_queries(head_item)

        state = (zero, first, zero, head_item, (zero,) * len(head_item))
        pending = lax.while_loop(lambda carry: carry[1] < total_items, attend_item, state)[-1]
        if parts is not None:
            settle(pending)
