"""The prefill kernel's producer: copies the pages that a tile sees into rings of blocks, and widens 8-bit ones to 16 bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import box_index

plgpu: Any = _mosaic_gpu  # not typed


@dataclasses.dataclass(frozen=True)
class Ring:
    """The producer's view of the blocks of K or of V in shared memory.

    Attributes:
        blocks: [stages, block, H], as the tensor cores want them.
        full, free: a barrier each; a block has come, and both compute warpgroups are done with it.
        staged: [staged, block, H] of 8-bit pages, or None; `arrived` are their barriers.
    """

    blocks: Any
    full: Any
    free: Any
    staged: Any = None
    arrived: Any = None

    def wait_for_place(self, t: jax.Array) -> None:
        """Until block t may be written."""
        stages = self.blocks.shape[0]

        @pl.when(t >= stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[lax.rem(t, stages)])

    def drain(self, t: jax.Array) -> None:
        """Until the blocks before t have all been used."""
        stages = self.blocks.shape[0]

        @pl.loop(jnp.maximum(t - stages, 0), t)
        def _(t: jax.Array) -> None:
            plgpu.barrier_wait(self.free.at[lax.rem(t, stages)])

    def widen(self, t: jax.Array) -> None:
        """Makes block t of 8-bit pages, which has been sent for, one of 16 bits."""
        (stages, block, dim), width = self.blocks.shape, 64
        slot, source = lax.rem(t, stages), lax.rem(t, self.staged.shape[0])
        plgpu.barrier_wait(self.arrived.at[source])
        self.wait_for_place(t)
        for first in range(0, block, 64):  # piece by piece: the producer has few registers
            for col in range(0, dim, width):
                piece = pl.ds(first, 64), pl.ds(col, width)
                x = plgpu.load(self.staged.at[(source, *piece)], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                self.blocks[(slot, *piece)] = x.astype(self.blocks.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[slot])


def copy_pages(
    mine: Any, item: Any, kv: Any, tables: Any, rings: tuple[Ring, Ring], first_keys: Any, *, block: int, page_size: int,
    group: int, windowed: bool,
) -> None:  # fmt: skip
    """Copies the pages of each tile's keys and values into their rings.

    Args:
        first_keys: of a position, gives the first key that its token sees, and the same at a multiple of the block.
        group: query heads a kv head.
    """
    box = kv.shape[1]
    narrow = rings[0].staged is not None
    staged = rings[0].staged.shape[0] if narrow else 0

    def copy_tile(n: jax.Array, t: jax.Array) -> Any:
        row, head, _, begin, end, position, _ = item(n)
        kv_head = lax.div(head, group)
        visible, lo = first_keys(position + begin)
        hi = position + end

        def copy_block(j: jax.Array, t: jax.Array) -> Any:
            base = lo + j * block

            def index_of(p: int) -> jax.Array:
                seen = visible if windowed else None
                return box_index(kv, tables, row, base + p * box, hi, page_size=page_size, visible=seen)

            def copy(v: int, p: int, index: jax.Array, to: Any, arrived: Any) -> None:
                at = to.at[lax.rem(t, to.shape[0]), pl.ds(p * box, box)]
                plgpu.copy_gmem_to_smem(kv.at[index, :, 2 * kv_head + v], at, arrived.at[lax.rem(t, to.shape[0])])

            if narrow:

                @pl.when(t >= staged)
                def _() -> None:  # the block before in this place; those after it are on their way
                    for ring in rings:
                        ring.widen(t - staged)

                for p in range(block // box):
                    index = index_of(p)
                    for v, ring in enumerate(rings):
                        copy(v, p, index, ring.staged, ring.arrived)
                return t + 1

            ids = [index_of(p) for p in range(block // box)]
            for v, ring in enumerate(rings):
                ring.wait_for_place(t)
                for p, index in enumerate(ids):
                    copy(v, p, index, ring.blocks, ring.full)
            return t + 1

        return lax.fori_loop(0, lax.div(hi - lo + (block - 1), block), copy_block, t)

    t = lax.fori_loop(0, mine, copy_tile, jnp.int32(0))
    if narrow:

        @pl.loop(jnp.maximum(t - staged, 0), t)
        def _(t: jax.Array) -> None:
            for ring in rings:
                ring.widen(t)

    for ring in rings:  # the interpreter wants every arrival waited for
        ring.drain(t)
