"""The decode kernel's producer: copies the pages of each work item into the ring, and widens 8-bit ones to 16 bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_registers import take
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import box_index

plgpu: Any = _mosaic_gpu  # not typed


def num_blocks(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Blocks of an item. One at least, of no tokens: a block is widened when a later one comes, so each item must bring one."""
    return jnp.maximum(lax.div(hi - lo + (BLOCK - 1), BLOCK), 1)


def copy_pages(
    pair: Any, first: Any, total: Any, item: Any, kv: Any, tables: Any, counters: Any, _sharing: Any, _sinks: Any, _out: Any,
    _parts: Any, _lse: Any, _qs: Any, ks: Any, vs: Any, wide: Any, box_of: Any, dealt: Any, _q_full: Any, k_full: Any, v_full: Any,
    k_free: Any, v_free: Any, dealt_full: Any, dealt_free: Any, wide_full: Any, wide_free: Any, *,
    stages: int, page_size: int, windowed: bool, workers: int, slot_of_pair: int,
) -> None:  # fmt: skip
    """Takes items, tells the compute warpgroup of them, and copies their pages into the ring of this pair of warpgroups.

    Takes the kernel's arguments as they come. The first item is `first`, the following ones come from a counter that all
    workers share: multiprocessors differ in how fast memory serves them, by a fifth and more.
    """
    box = kv.shape[1]
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

    def deal(n: jax.Array, i: jax.Array) -> None:
        """Tells the compute warpgroup that its n-th item is i; from `total` on, that there are no more."""
        slot = pair * stages + lax.rem(n, stages)

        @pl.when(n >= stages)
        def _() -> None:
            plgpu.barrier_wait(dealt_free.at[slot])

        dealt[slot] = i
        plgpu.barrier_arrive(dealt_full.at[slot])

    def copy_item(carry: Any) -> Any:
        n, i, t = carry
        row, head, lo, hi, _, _, visible = item(i)[:7]

        def copy_block(j: jax.Array, t: jax.Array) -> Any:
            slot = pair * stages + lax.rem(t, stages)
            base = lo + j * BLOCK

            def index_of(p: int) -> jax.Array:
                seen = visible if windowed else None
                return box_index(kv, tables, row, base + p * box, hi, page_size=page_size, visible=seen)

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

        t = lax.fori_loop(0, num_blocks(lo, hi), copy_block, t)
        i = workers + take(counters, counters.shape[0] - 1, total, box_of, slot_of_pair + pair)
        deal(n + 1, i)
        return n + 1, i, t

    deal(jnp.int32(0), first)
    n, t = lax.while_loop(lambda carry: carry[1] < total, copy_item, (jnp.int32(0), first, jnp.int32(0)))[::2]
    if narrow:

        @pl.loop(jnp.maximum(t - (stages - 1), 0), t)
        def widen_rest(t: jax.Array) -> None:
            widen(t)

    @pl.loop(jnp.maximum(n + 1 - stages, 0), n + 1)
    def await_deals(n: jax.Array) -> None:  # the interpreter wants every arrival waited for
        plgpu.barrier_wait(dealt_free.at[pair * stages + lax.rem(n, stages)])

    depth = 1 if narrow else stages

    @pl.loop(jnp.maximum(t - depth, 0), t)
    def await_copies(t: jax.Array) -> None:
        for v, free in enumerate((k_free, v_free)):
            plgpu.barrier_wait(wide_free.at[2 * pair + v] if narrow else free.at[pair * stages + lax.rem(t, stages)])
