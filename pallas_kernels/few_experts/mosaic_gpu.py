"""Blocks of 16 rows times their experts' matrices, for Hopper: bound by reading the matrices, so all multiprocessors read.

Persistent thread blocks take tiles of a block and some columns: a producer warpgroup copies pieces of both operands into a ring in
shared memory, and one compute warpgroup multiplies 64 rows, of which 16 are wanted. Behind a gated product comes its activation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxtyping import Array, Float, Int

plgpu: Any = _mosaic_gpu  # not typed

ROWS = 64  # of a warpgroup's product
DEPTH = 64  # of a piece: 128 bytes of bf16
CTAS = 132  # one a multiprocessor
STAGES = 8  # pieces of both operands in shared memory: 144 kB on their way


def multiply(
    x: Float[Array, "rows K"],
    w: Float[Array, "E K M"],
    experts: Int[Array, " E"],
    num_blocks: Int[Array, " 1"],
    most_blocks: int,
    block: int,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "most_blocks*block N"]:
    """See api.multiply; `block` rows are one expert's."""
    parts = 1 if activation is None else 2
    num_cols = w.shape[2] // parts
    cols = 128 if parts == 1 and num_cols % 128 == 0 else 64
    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    body = _Body(
        block=block, is_shared=x.shape[0] == block, pieces=x.shape[1] // DEPTH, cols=cols, across=num_cols // cols, parts=parts,
        activation=activation,
    )  # fmt: skip

    def expert_products(*refs: Any) -> None:
        body(*refs)

    product: jax.Array = plgpu.kernel(
        expert_products,
        out_type=jax.ShapeDtypeStruct((most_blocks * block, num_cols), x.dtype),
        grid=(CTAS,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            plgpu.SMEM((STAGES, ROWS, DEPTH), x.dtype, transforms=tiles),
            plgpu.SMEM((STAGES, parts, DEPTH, cols), x.dtype, transforms=tiles),
            plgpu.SMEM((ROWS, cols), x.dtype, transforms=tiles),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
        ],
    )(x, w, experts, num_blocks)
    return product


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """The kernel's body and its static parameters."""

    block: int
    is_shared: bool
    pieces: int
    cols: int
    across: int
    parts: int
    activation: Callable[[Array], Array] | None

    def __call__(
        self, x: Any, w: Any, experts: Any, num_blocks: Any, out: Any, xs: Any, ws: Any, outs: Any, full: Any, free: Any
    ) -> None:
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        mine = lax.div(num_blocks[0] * self.across - cta + (CTAS - 1), CTAS)

        def tile(n: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Block and first column of this thread block's n-th tile."""
            i = cta + n * CTAS
            return lax.div(i, self.across), pl.multiple_of(lax.rem(i, self.across) * self.cols, self.cols)

        @pl.when(wg == 1)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            self.produce(mine, tile, x, w, experts, xs, ws, full, free)

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            self.compute(mine, tile, out, xs, ws, outs, full, free)

    def produce(self, mine: Any, tile: Any, x: Any, w: Any, experts: Any, xs: Any, ws: Any, full: Any, free: Any) -> None:
        """Copies both operands of each tile into the ring."""

        def copy_tile(n: jax.Array, carry: None) -> None:
            block, col = tile(n)
            expert = experts[block]
            row = 0 if self.is_shared else pl.multiple_of(block * self.block, self.block)

            def copy_piece(j: jax.Array, carry: None) -> None:
                t = n * self.pieces + j
                slot = lax.rem(t, STAGES)

                @pl.when(t >= STAGES)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                depth = pl.ds(pl.multiple_of(j * DEPTH, DEPTH), DEPTH)
                for part in range(self.parts):
                    columns = pl.ds(pl.multiple_of(col + part * self.across * self.cols, self.cols), self.cols)
                    plgpu.copy_gmem_to_smem(w.at[expert, depth, columns], ws.at[slot, part], full.at[slot])
                at = xs.at[slot, pl.ds(0, self.block)]  # the tile's other rows may hold anything: they are not stored
                plgpu.copy_gmem_to_smem(x.at[pl.ds(row, self.block), depth], at, full.at[slot])

            lax.fori_loop(0, self.pieces, copy_piece, None)

        lax.fori_loop(0, mine, copy_tile, None)

        def drain(t: jax.Array, carry: None) -> None:  # the interpreter wants every arrival waited for
            plgpu.barrier_wait(free.at[lax.rem(t, STAGES)])

        pieces = mine * self.pieces
        lax.fori_loop(jnp.maximum(pieces - STAGES, 0), pieces, drain, None)

    def compute(self, mine: Any, tile: Any, out: Any, xs: Any, ws: Any, outs: Any, full: Any, free: Any) -> None:
        """Each tile's product, and what its activation makes of it."""

        def multiply_tile(n: jax.Array, carry: None) -> None:
            def products(*accs: Any) -> tuple[jax.Array, ...]:
                def multiply_piece(j: jax.Array, carry: None) -> None:
                    t = n * self.pieces + j
                    slot = lax.rem(t, STAGES)
                    plgpu.barrier_wait(full.at[slot])
                    for part, acc in enumerate(accs):
                        plgpu.wgmma(acc, xs.at[slot], ws.at[slot, part])
                    plgpu.wgmma_wait(self.parts)  # the piece before is done with

                    @pl.when(j > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(free.at[lax.rem(t + (STAGES - 1), STAGES)])

                lax.fori_loop(0, self.pieces, multiply_piece, None)
                return tuple(acc[...] for acc in accs)

            found = pl.run_scoped(products, *[plgpu.ACC((ROWS, self.cols), jnp.float32)] * self.parts)
            plgpu.barrier_arrive(free.at[lax.rem(n * self.pieces + (self.pieces - 1), STAGES)])
            product = found[0] if self.activation is None else self.activation(found[0]) * found[1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
            outs[...] = product.astype(out.dtype)
            plgpu.commit_smem()
            block, col = tile(n)
            row = pl.multiple_of(block * self.block, self.block)
            plgpu.copy_smem_to_gmem(outs.at[pl.ds(0, self.block)], out.at[pl.ds(row, self.block), pl.ds(col, self.cols)])

        lax.fori_loop(0, mine, multiply_tile, None)
        plgpu.wait_smem_to_gmem(0)
