"""Paged prefill attention for Hopper: rows with several query tokens, whole prompts or chunks behind a paged prefix.

Persistent thread blocks take tiles of 128 query tokens of one head: a producer warpgroup copies pages of K and V into a ring
in shared memory, two compute warpgroups of 64 tokens take turns, one on the tensor cores while the other does its softmax
(FlashAttention-3; Shah et al. 2024). 8-bit pages are copied to a ring of their own, and the producer widens them to 16 bits on the
way to that of the tensor cores. Knows arrays and a PrefillPlan only; rows of one token are decode's.
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

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import ALIGN, PrefillPlan
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_prefill_pages import Ring, copy_pages
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_registers import store_rows
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import LOG2E, LOW, ROWS, check_decode, tiles

plgpu: Any = _mosaic_gpu  # not typed


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Sizes of the kernel.

    Attributes:
        block: keys a step.
        stages: blocks of K and of V in shared memory.
        staged: blocks of 8-bit K and of V on their way to be widened.
        ctas: persistent thread blocks, one a multiprocessor.
        registers: of a producer and of a compute thread; first + 2 * second <= 504, what a block of 384 threads starts
            with: a warpgroup that asks for more waits for ever.
    """

    block: int = 128
    stages: int = 2
    staged: int = 2
    ctas: int = 132
    registers: tuple[int, int] = (40, 232)


def choose_config(head_dim: int, num_bits: int = 16) -> PrefillConfig:
    """The sizes that measured best on an H100 for 16-bit pages, and that spill nothing or least for 8 bits (bench/NOTES.md)."""
    if num_bits == 8:
        return {
            64: PrefillConfig(stages=4, staged=3, registers=(56, 224)),
            128: PrefillConfig(registers=(56, 224)),
            256: PrefillConfig(block=64, stages=1, registers=(56, 224)),
        }[head_dim]
    return {64: PrefillConfig(stages=4), 128: PrefillConfig(), 256: PrefillConfig(block=64)}[head_dim]


def prefill(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages page_size 2*K H"],
    page_tables: Int[Array, "B P"],
    plan: PrefillPlan,
    sinks: Float[Array, " N"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Any = None,
    config: PrefillConfig | None = None,
) -> jax.Array | None:
    """Causal attention of the tiles in `plan`.

    Args:
        q: packed queries.
        kv_pages: one layer's pool, in q's type or float8_e4m3fn.
        page_tables: pages of each row.
        plan: made by plan_prefill for these rows; it holds the window.
        sinks: a logit for each head that only adds to the softmax's denominator.
        scale: factor on q . k.
        softcap: logits become softcap * tanh(logits / softcap).
        k_scale: keys are k_scale times the stored values.
        v_scale: values are v_scale times the stored values.
        out: a jax.Ref [T, N, H] to write to, other tokens untouched; None returns a new array, whose other tokens are undefined.
        config: None chooses.

    Raises:
        NotImplementedError: see check_decode.
    """
    check_decode(q, kv_pages)
    num_tokens, num_heads, head_dim = q.shape
    if q.size >= 2**31:
        raise NotImplementedError(f"offsets are 32 bit; got {q.size} elements of queries")
    narrow = kv_pages.dtype.itemsize == 1
    compute_type = jnp.float16 if narrow else q.dtype  # Hopper converts e4m3 to f16 alone
    config = config or choose_config(head_dim, kv_pages.dtype.itemsize * 8)
    num_kv_heads = kv_pages.shape[2] // 2
    pages, page_size, _, _ = kv_pages.shape
    box = min(page_size, config.block)
    boxes = kv_pages.reshape(pages * (page_size // box), box, 2 * num_kv_heads, head_dim)
    missing = max(ROWS - num_tokens, -num_tokens % ALIGN)  # a bulk copy takes 64 rows from a multiple of 8
    queries = q.astype(compute_type)
    queries = jnp.pad(queries, ((0, missing), (0, 0), (0, 0))) if missing > 0 else queries
    body = _Body(
        config=config,
        factor=scale * k_scale,
        softcap=softcap,
        v_scale=v_scale,
        window=plan.window,
        page_size=page_size,
        group=num_heads // num_kv_heads,
    )
    operands: list[Any] = [queries, boxes, page_tables, plan.items, plan.num_items]
    operands += [sinks.astype(jnp.float32) * LOG2E] if sinks is not None else []
    operands += [out] if out is not None else []

    def paged_prefill(*refs: Any) -> None:
        inputs, rest = refs[:5], list(refs[5:])
        sink_ref = rest.pop(0) if sinks is not None else None
        body(*[*inputs, sink_ref, *rest])

    results = plgpu.kernel(
        paged_prefill,
        out_type=[] if out is not None else [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=_scratch(config, head_dim, box, kv_pages.dtype, compute_type),
    )(*operands)
    return None if out is not None else results[0]


def _scratch(config: PrefillConfig, head_dim: int, box: int, page_type: Any, compute_type: Any) -> list[Any]:
    narrow = jnp.dtype(page_type).itemsize == 1
    copies = config.block // box
    ring = plgpu.SMEM((config.stages, config.block, head_dim), compute_type, transforms=tiles(head_dim, 2))
    full = plgpu.Barrier(num_arrivals=1 if narrow else copies, num_barriers=config.stages)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=config.stages)
    staged = (
        plgpu.SMEM(
            (config.staged, config.block, head_dim),
            page_type,
            transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64)),
        )
        if narrow
        else None
    )
    arrived = plgpu.Barrier(num_arrivals=copies, num_barriers=config.staged) if narrow else None
    return [
        plgpu.SMEM((2, ROWS, head_dim), compute_type, transforms=tiles(head_dim, 2)),  # queries
        *(ring, ring),  # keys, values
        *(staged, staged, arrived, arrived),
        plgpu.Barrier(num_barriers=2),
        *(full, full, free, free),
        plgpu.Barrier(num_arrivals=2),  # turns
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """The kernel's body and its static parameters."""

    config: PrefillConfig
    factor: float
    softcap: float | None
    v_scale: float
    window: int | None
    page_size: int
    group: int

    def __call__(
        self, q: Any, kv: Any, tables: Any, items: Any, num_items: Any, sinks: Any, out: Any, qs: Any, ks: Any, vs: Any,
        k_staged: Any, v_staged: Any, k_arrived: Any, v_arrived: Any, q_full: Any, k_full: Any, v_full: Any, k_free: Any,
        v_free: Any, turn: Any,
    ) -> None:  # fmt: skip
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        # Dealt back and forth: items come by falling size, so the sums stay even.
        ctas = self.config.ctas

        def seat(n: jax.Array) -> jax.Array:
            return jnp.where(lax.rem(n, 2) == 0, cta, ctas - 1 - cta)

        def mine() -> jax.Array:
            """How many items are this block's. Each warpgroup computes it anew: kept from before they part, it is spilled."""
            total = num_items[0]
            rounds = lax.div(total, ctas)
            return rounds + jnp.where(seat(rounds) < lax.rem(total, ctas), 1, 0)

        def item(n: jax.Array) -> tuple[jax.Array, ...]:
            """The fields of plan.items of this block's n-th item: row, head, token, begin, end, position, length."""
            i = jnp.minimum(n * ctas + seat(n), items.shape[0] - 1)
            return tuple(items[i, f] for f in range(7))

        @pl.when(wg == 2)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[0], action="decrease")
            rings = Ring(ks, k_full, k_free, k_staged, k_arrived), Ring(vs, v_full, v_free, v_staged, v_arrived)
            sizes = {"block": self.config.block, "page_size": self.page_size, "group": self.group}
            copy_pages(mine(), item, kv, tables, rings, self.first_keys, **sizes, windowed=self.window is not None)

        @pl.when(wg < 2)
        def _() -> None:
            plgpu.set_max_registers(self.config.registers[1], action="increase")
            self.compute(wg, mine(), item, q, sinks, out, qs, ks, vs, q_full, k_full, v_full, k_free, v_free, turn)

    def first_keys(self, position: jax.Array) -> tuple[Any, Any]:
        """First key that the token at `position` sees, and the same at a multiple of the block."""
        if self.window is None:
            return 0, 0
        visible = jnp.maximum(position - (self.window - 1), 0)
        return visible, lax.div(visible, self.config.block) * self.config.block

    def compute(
        self, wg: Any, mine: Any, item: Any, q: Any, sinks: Any, out: Any, qs: Any, ks: Any, vs: Any, q_full: Any,
        k_full: Any, v_full: Any, k_free: Any, v_free: Any, turn: Any,
    ) -> None:  # fmt: skip
        """Attention of 64 query tokens of each tile."""
        layout = plgpu.Layout.WGMMA
        block, stages = self.config.block, self.config.stages
        num_heads, dim = q.shape[1], q.shape[2]
        scale = LOG2E * (self.factor if self.softcap is None else self.softcap)  # of logits in base 2
        above = wg * ROWS  # tokens of the tile before this warpgroup's

        def pass_turn() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def load_queries(head: jax.Array, token: jax.Array) -> None:
            start = pl.multiple_of(token + above, ALIGN)
            plgpu.copy_gmem_to_smem(q.at[pl.ds(start, ROWS), head], qs.at[wg], q_full.at[wg])

        def attend(j: jax.Array, carry: Any, base: Any, row_position: Any, length: Any, masked: bool) -> Any:
            acc, top, total, t = carry
            slot = lax.rem(t, stages)
            base = base + j * block

            # 1. Logits, on the tensor cores: the other warpgroup is in its softmax.
            plgpu.barrier_wait(k_full.at[slot])

            def logits(ref: Any) -> Any:
                plgpu.wgmma(ref, qs.at[wg], ks.at[slot].transpose((1, 0)))
                pass_turn()
                return ref[...]

            x = pl.run_scoped(logits, plgpu.ACC((ROWS, block), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])

            # 2. Online softmax, to base 2.
            if self.softcap is not None:
                x = jnp.tanh(x * (self.factor / self.softcap))
            if masked:
                ahead = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=layout)
                ahead = ahead - plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 0, layout=layout)
                seen = ahead <= row_position - base
                if self.window is not None:
                    seen &= ahead > row_position - base - self.window
                x = jnp.where(seen, x, -jnp.inf)
            high = jnp.maximum(top, x.max(axis=1) * scale)
            shrink = jnp.exp2(top - high)
            p = jnp.exp2(x * scale - lax.broadcast_in_dim(high, x.shape, [0]))
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            total = total * shrink + p.sum(axis=1)
            # All of it before the turn passes: else the compiler moves arithmetic into this warpgroup's time on the tensor cores.
            acc, total, high, p16 = lax.optimization_barrier((acc, total, high, p.astype(q.dtype)))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.barrier_wait(turn)

            # 3. Weighted values, on the tensor cores.
            if masked:
                left = length - base

                @pl.when(left < block)
                def _() -> None:  # slots past the row's end may hold anything, and 0 * NaN is NaN
                    for first in range(0, block, 64):
                        for col in range(0, dim, 64):
                            part = vs.at[slot, pl.ds(first, 64), pl.ds(col, 64)]
                            v = plgpu.load(part, layout=layout)
                            key = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=layout)
                            part[...] = jnp.where(key < left - first, v, jnp.zeros_like(v))
                    plgpu.commit_smem()

            def add_values(ref: Any) -> None:
                plgpu.wgmma(ref, p16, vs.at[slot])

            acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, high, total, t + 1

        def skip(_j: jax.Array, t: jax.Array) -> jax.Array:
            """A block that only the other warpgroup needs."""
            slot = lax.rem(t, stages)
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            pass_turn()
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            pass_turn()
            return t + 1

        def attend_tile(n: jax.Array, carry: Any) -> Any:
            t, (_row, head, token, begin, end, position, length) = carry
            lo = self.first_keys(position + begin)[1]
            acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), layout)
            low, none = (LOW, 0.0) if sinks is None else (sinks[head], 1.0)
            top = plgpu.layout_cast(jnp.full((ROWS,), low, jnp.float32), layout.reduce(1))
            total = plgpu.layout_cast(jnp.full((ROWS,), none, jnp.float32), layout.reduce(1))

            # 1. The blocks: [left edge of the window,] those that every row sees, the diagonal, those of the other warpgroup.
            rows = jnp.clip(end - above, 0, ROWS)
            blocks = lax.div(position + end - lo + (block - 1), block)
            own = jnp.where(rows > 0, lax.div(position + above + rows - lo + (block - 1), block), 0)
            plain = jnp.clip(lax.div(position + above + 1 - lo, block), 0, own)
            step = functools.partial(attend, base=lo, row_position=position + above, length=length)
            plgpu.barrier_wait(q_full.at[wg])
            state = (acc, top, total, t)
            start: Any = 0
            if self.window is not None:
                edge = lax.div(jnp.maximum(position + above + ROWS - self.window - lo, 0) + (block - 1), block)
                start = jnp.minimum(edge, own)
                state = lax.fori_loop(0, start, functools.partial(step, masked=True), state)
                plain = jnp.maximum(plain, start)
            state = lax.fori_loop(start, plain, functools.partial(step, masked=False), state)
            acc, top, total, t = lax.fori_loop(plain, own, functools.partial(step, masked=True), state)
            t = lax.fori_loop(own, blocks, skip, t)

            # 2. The result, while the other warpgroup has the tensor cores.
            pass_turn()
            following = item(n + 1)
            acc = acc * lax.broadcast_in_dim(jnp.where(total > 0, self.v_scale / total, 0.0), acc.shape, [0])

            @pl.when(n + 1 < mine)
            def _() -> None:
                load_queries(*following[1:3])

            skipped = jnp.maximum(begin - above, 0)
            base = ((token + above + skipped) * num_heads + head) * dim
            store_rows(acc, out, base, skipped, jnp.maximum(rows - skipped, 0), stride=num_heads * dim)
            pass_turn()
            return t, following

        pl.when(wg == 1)(pass_turn)

        @pl.when(mine > 0)
        def start() -> None:
            first = item(jnp.int32(0))
            load_queries(*first[1:3])
            lax.fori_loop(0, mine, attend_tile, (jnp.int32(0), first))

        pl.when(wg == 0)(pass_turn)
