"""Grouped matmul for Hopper: every block of rows is of one group, so a tile is an ordinary matrix product.

Persistent thread blocks take tiles of a block of rows and some columns: a producer warpgroup copies pieces of both operands
into a ring in shared memory, one compute warpgroup for each 64 rows multiplies them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxtyping import Array, Float, Int

plgpu: Any = _mosaic_gpu  # not typed

ROWS = 64  # of a warpgroup
DEPTH = 64  # of a piece: 128 bytes of bf16
CTAS = 132  # one a multiprocessor


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        cols: of a tile.
        stages: pieces of both operands in shared memory.
    """

    cols: int = 256
    stages: int = 4


def serves(shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes matrices [E, K, M] of this shape."""
    return shape[1] % DEPTH == 0 and shape[2] % ROWS == 0


def choose_config(rows: int, num_blocks: int, num_cols: int) -> Config:
    """The widest tile that divides the columns, unless too few thread blocks would have one."""
    wide = next(c for c in (256, 192, 128, 64) if num_cols % c == 0)
    if wide > 128 and num_cols % 128 == 0 and num_blocks * (num_cols // wide) < CTAS:
        wide = 128
    return Config(wide, stages=4 if rows == ROWS or wide < 256 else 3)


def grouped_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, "E K M"],
    block_groups: Int[Array, " blocks"],
    num_blocks: Int[Array, " 1"],
    config: Config | None = None,
) -> Float[Array, "R M"]:
    """Each block of R / blocks rows (8 to 128) times its group's matrix; blocks from num_blocks[0] on are left undefined.

    A tile has at least 64 rows. Of a smaller block's tile, the rows that follow belong to other groups and are not stored.
    """
    (total_rows, depth), num_cols = x.shape, w.shape[2]
    block = total_rows // block_groups.shape[0]
    rows = max(block, ROWS)
    config = config or choose_config(rows, block_groups.shape[0], num_cols)
    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    warpgroups = rows // ROWS
    body = _Body(config=config, block=block, rows=rows, pieces=depth // DEPTH, warpgroups=warpgroups)
    product: jax.Array = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((total_rows, num_cols), x.dtype),
        grid=(CTAS,),
        grid_names=("cta",),
        num_threads=1 + warpgroups,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((config.stages, rows, DEPTH), x.dtype, transforms=tiles),
            plgpu.SMEM((config.stages, DEPTH, config.cols), x.dtype, transforms=tiles),
            plgpu.SMEM((warpgroups, ROWS, config.cols), x.dtype, transforms=tiles),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=config.stages),
        ],
    )(x, w, block_groups, num_blocks)
    return product


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """The kernel's body and its static parameters."""

    config: Config
    block: int
    rows: int
    pieces: int
    warpgroups: int

    def __call__(
        self, x: Any, w: Any, block_groups: Any, num_blocks: Any, out: Any, xs: Any, ws: Any, outs: Any, full: Any, free: Any
    ) -> None:
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        across = w.shape[2] // self.config.cols
        mine = lax.div(num_blocks[0] * across - cta + (CTAS - 1), CTAS)

        def tile(n: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Block and first column of this thread block's n-th tile: neighbours read the same rows and matrices."""
            i = cta + n * CTAS
            return lax.div(i, across), pl.multiple_of(lax.rem(i, across) * self.config.cols, self.config.cols)

        @pl.when(wg == self.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            self.produce(mine, tile, x, w, block_groups, xs, ws, full, free)

        @pl.when(wg < self.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            self.compute(wg, mine, tile, out, xs, ws, outs, full, free)

    def produce(self, mine: Any, tile: Any, x: Any, w: Any, block_groups: Any, xs: Any, ws: Any, full: Any, free: Any) -> None:
        """Copies both operands of each tile into the ring."""
        stages = self.config.stages

        def copy_tile(n: jax.Array, carry: None) -> None:
            block, col = tile(n)
            group = block_groups[block]

            def copy_piece(j: jax.Array, carry: None) -> None:
                t = n * self.pieces + j
                slot = lax.rem(t, stages)

                @pl.when(t >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                depth = pl.ds(pl.multiple_of(j * DEPTH, DEPTH), DEPTH)
                row = pl.multiple_of(block * self.block, self.block)
                plgpu.copy_gmem_to_smem(w.at[group, depth, pl.ds(col, self.config.cols)], ws.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x.at[pl.ds(row, self.rows), depth], xs.at[slot], full.at[slot])

            lax.fori_loop(0, self.pieces, copy_piece, None)

        lax.fori_loop(0, mine, copy_tile, None)

        def drain(t: jax.Array, carry: None) -> None:  # the interpreter wants every arrival waited for
            plgpu.barrier_wait(free.at[lax.rem(t, stages)])

        pieces = mine * self.pieces
        lax.fori_loop(jnp.maximum(pieces - stages, 0), pieces, drain, None)

    def compute(self, wg: Any, mine: Any, tile: Any, out: Any, xs: Any, ws: Any, outs: Any, full: Any, free: Any) -> None:
        """The product of 64 rows of each tile."""
        cols, stages = self.config.cols, self.config.stages
        above = pl.multiple_of(wg * ROWS, ROWS)

        def multiply_tile(n: jax.Array, carry: None) -> None:
            def multiply(acc: Any) -> jax.Array:
                def multiply_piece(j: jax.Array, carry: None) -> None:
                    t = n * self.pieces + j
                    slot = lax.rem(t, stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, xs.at[slot, pl.ds(above, ROWS)], ws.at[slot])
                    plgpu.wgmma_wait(1)  # the piece before is done with

                    @pl.when(j > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(free.at[lax.rem(t + (stages - 1), stages)])

                lax.fori_loop(0, self.pieces, multiply_piece, None)
                product: jax.Array = acc[...]
                return product

            product = pl.run_scoped(multiply, plgpu.ACC((ROWS, cols), jnp.float32))
            plgpu.barrier_arrive(free.at[lax.rem(n * self.pieces + (self.pieces - 1), stages)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
            outs.at[wg][...] = product.astype(out.dtype)
            plgpu.commit_smem()
            block, col = tile(n)
            row = pl.multiple_of(block * self.block, self.block) + above
            stored = min(self.block, ROWS)
            plgpu.copy_smem_to_gmem(outs.at[wg, pl.ds(0, stored)], out.at[pl.ds(row, stored), pl.ds(col, cols)])

        lax.fori_loop(0, mine, multiply_tile, None)
        plgpu.wait_smem_to_gmem(0)
