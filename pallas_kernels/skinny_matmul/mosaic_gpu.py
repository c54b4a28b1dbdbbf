"""Matmul of few rows for Hopper: as fast as the weights can be read. Knows arrays only.

The weights are wgmma's M operand, 64 output features at a time, and the rows its N operand, of which any multiple of 8 will do.
The weights are cut into tiles of some features, tiles into pieces of some inputs, and every multiprocessor's thread block takes
an equal run of pieces, whatever tiles they belong to (stream-K; https://arxiv.org/abs/2301.03598). A tile is finished by the
block that has its last piece: it adds what the blocks before have summed, always in the same order. Blocks go through their
runs from the back, so the part that others wait for comes first, and a block only waits for blocks before it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float

plgpu: Any = _mosaic_gpu  # not typed
mgpu: Any = _utils

CTAS = 132  # one a multiprocessor
WARPGROUPS = 2  # that multiply; one more copies
THREADS = 128  # of a warpgroup
LEAST_RUN = 4  # pieces of a thread block: 64 KB, about what it must have under way to keep memory busy
MOST_SHARERS = 8  # thread blocks of a tile: the last of them reads the others' sums, one after the other
CHUNK = 64  # rows and features that are stored at a time
SHARED_MEMORY = 232_448 - 1024  # of a thread block, less what barriers take
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        cols: output features of a tile, 128 or 256.
        depth: inputs of a piece: 128 bytes of weights.
        stages: pieces in shared memory.
    """

    cols: int
    depth: int
    stages: int


def choose_config(rows: int, cols: int, w_dtype: DTypeLike, out_dtype: DTypeLike, tile: int | None = None) -> Config:
    """Wide tiles where a piece of the rows, which every tile reads again, would be more than half of a piece of weights."""
    itemsize = jnp.dtype(w_dtype).itemsize
    depth = 128 // itemsize
    if tile is None:
        can_be_wide = rows <= 128 and cols % 256 == 0  # more accumulators do not fit the registers
        tile = 256 if can_be_wide and 2 * rows * 2 > 128 * itemsize else 128
    stored = WARPGROUPS * min(rows, CHUNK) * CHUNK * jnp.dtype(out_dtype).itemsize
    piece = tile * depth * itemsize + rows * depth * 2
    return Config(tile, depth, min(12, (SHARED_MEMORY - stored) // piece))


def count_blocks(tiles: int, pieces: int) -> int:
    """Thread blocks for so many tiles of so many pieces: fewer than there are multiprocessors for small matrices."""
    return max(1, min(CTAS, tiles * pieces // max(LEAST_RUN, -(-pieces // MOST_SHARERS))))


def skinny_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, "..."],
    scales: Float[Array, " M"] | None = None,
    *,
    inputs_last: bool,
    out_dtype: DTypeLike,
    tile: int | None = None,
) -> Float[Array, "R M"]:
    """x times w, each output feature times its scale, summed in float32.

    Args:
        x: bfloat16; R is at most 256, K a multiple of 128 bytes of weights.
        w: bfloat16 [K, M], or [M, K] with inputs_last; float8_e4m3fn [M, K]. M is a multiple of 128.
        scales: float32.
        tile: output features of a tile, 128 or 256; None chooses.
    """
    (num_rows, depth), cols = x.shape, w.shape[0 if inputs_last else 1]
    x = jnp.pad(x, ((0, -num_rows % 8), (0, 0)))
    rows = x.shape[0]
    config = choose_config(rows, cols, w.dtype, out_dtype, tile)
    pieces, tiles = depth // config.depth, cols // config.cols
    ctas = count_blocks(tiles, pieces)
    mine = config.cols // WARPGROUPS
    body = _Body(config=config, ctas=ctas, tiles=tiles, pieces=pieces, rows=rows, inputs_last=inputs_last)

    def skinny_matmul(x: Any, w: Any, flags: Any, *refs: Any) -> None:
        body(x, w, flags, *(refs if scales is not None else (None, *refs)))

    piece = (config.cols, config.depth) if inputs_last else (config.depth, config.cols)

    def shared(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        tiles = (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=tiles)

    # The blocks' notes to each other. Whoever reads one clears it, so XLA may have one array of zeros for all calls of a
    # program: it runs them one after the other.
    flags = jnp.zeros(ctas * WARPGROUPS, jnp.int32)
    out, _ = plgpu.kernel(
        skinny_matmul,
        out_type=[
            jax.ShapeDtypeStruct((rows, cols), out_dtype),
            jax.ShapeDtypeStruct((ctas, WARPGROUPS, mine, rows), jnp.float32),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        scratch_types=[
            shared((config.stages, rows, config.depth), x.dtype),
            shared((config.stages, *piece), w.dtype),
            shared((WARPGROUPS, min(rows, CHUNK), CHUNK), out_dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=config.stages),
        ],
    )(x, w, flags, *(() if scales is None else (scales,)))
    product: Array = out[:num_rows]
    return product


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """The kernel's body and its static parameters."""

    config: Config
    ctas: int
    tiles: int
    pieces: int
    rows: int
    inputs_last: bool

    def __call__(
        self, x: Any, w: Any, flags: Any, scales: Any, out: Any, parts: Any, xs: Any, ws: Any, outs: Any, full: Any, free: Any
    ) -> None:
        wg = lax.axis_index("wg")

        @pl.when(wg == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            self.produce(x, w, xs, ws, full, free)

        @pl.when(wg < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            self.compute(wg, flags, scales, out, parts, xs, ws, outs, full, free)

    def first_piece(self, cta: Any) -> Any:
        """Where a thread block's run begins, of the pieces of all tiles in a row."""
        return lax.div(cta * (self.tiles * self.pieces), self.ctas)

    def opener(self, tile: Any) -> Any:
        """The thread block that has a tile's first piece."""
        return lax.div((tile * self.pieces + 1) * self.ctas - 1, self.tiles * self.pieces)

    def for_each_part(self, do: Any) -> None:
        """do(tile, first, end, t) for what this block has of each tile, from its last tile to its first.

        first and end are pieces of the tile, t is how many pieces the block has had before.
        """
        cta = lax.axis_index("cta")
        begin, end = self.first_piece(cta), self.first_piece(cta + 1)
        last_tile = lax.div(end - 1, self.pieces)

        def part(n: jax.Array, carry: None) -> None:
            tile = last_tile - n
            start = tile * self.pieces
            stop = jnp.minimum(end - start, self.pieces)
            do(tile, jnp.maximum(begin - start, 0), stop, end - (start + stop))

        lax.fori_loop(0, last_tile - lax.div(begin, self.pieces) + 1, part, None)

    def produce(self, x: Any, w: Any, xs: Any, ws: Any, full: Any, free: Any) -> None:
        """Copies rows and weights of each piece into the ring."""
        depth, cols, stages = self.config.depth, self.config.cols, self.config.stages

        def copy_part(tile: jax.Array, first: jax.Array, end: jax.Array, before: jax.Array) -> None:
            features = pl.ds(pl.multiple_of(tile * cols, cols), cols)

            def copy_piece(j: jax.Array, carry: None) -> None:
                t = before + j - first
                slot = lax.rem(t, stages)

                @pl.when(t >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                inputs = pl.ds(pl.multiple_of(j * depth, depth), depth)
                piece = w.at[features, inputs] if self.inputs_last else w.at[inputs, features]
                plgpu.copy_gmem_to_smem(piece, ws.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x.at[:, inputs], xs.at[slot], full.at[slot])

            lax.fori_loop(first, end, copy_piece, None)

        self.for_each_part(copy_part)

        def drain(t: jax.Array, carry: None) -> None:  # the interpreter wants every arrival waited for
            plgpu.barrier_wait(free.at[lax.rem(t, stages)])

        cta = lax.axis_index("cta")
        count = self.first_piece(cta + 1) - self.first_piece(cta)
        lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)

    def compute(
        self, wg: Any, flags: Any, scales: Any, out: Any, parts: Any, xs: Any, ws: Any, outs: Any, full: Any, free: Any
    ) -> None:
        """Half of each tile's features: sums its pieces, and finishes the tile or leaves the sum to the block that does."""
        cta, stages, mine = lax.axis_index("cta"), self.config.stages, self.config.cols // WARPGROUPS
        features = pl.ds(pl.multiple_of(wg * mine, mine), mine)
        narrow = ws.dtype.itemsize == 1

        def weights(slot: jax.Array) -> Any:
            if narrow:  # exact, by way of float16: e4m3 has no shorter way to bfloat16 on Hopper
                values = plgpu.load(ws.at[slot, features], layout=plgpu.Layout.WGMMA)
                return values.astype(jnp.float32).astype(jnp.bfloat16)
            return ws.at[slot, features] if self.inputs_last else ws.at[slot, :, features].T

        def multiply_part(tile: jax.Array, first: jax.Array, end: jax.Array, before: jax.Array) -> None:
            def multiply(acc: Any) -> jax.Array:
                def multiply_piece(j: jax.Array, carry: None) -> None:
                    t = before + j - first
                    slot = lax.rem(t, stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, weights(slot), xs.at[slot].T)
                    if narrow:  # the next piece's weights go to the same registers
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])
                    else:
                        plgpu.wgmma_wait(1)  # the piece before is done with

                        @pl.when(j > first)
                        def _() -> None:
                            plgpu.barrier_arrive(free.at[lax.rem(t + (stages - 1), stages)])

                lax.fori_loop(first, end, multiply_piece, None)
                product: jax.Array = acc[...]
                return product

            acc = pl.run_scoped(multiply, plgpu.ACC((mine, self.rows), jnp.float32))
            if not narrow:
                plgpu.barrier_arrive(free.at[lax.rem(before + (end - first) + (stages - 1), stages)])

            @pl.when(end < self.pieces)
            def _() -> None:
                parts[cta, wg] = acc
                signal(flags, wg * self.ctas + cta)

            @pl.when(end == self.pieces)
            def _() -> None:
                def add(other: jax.Array, acc: jax.Array) -> jax.Array:
                    total: jax.Array = acc + plgpu.load(parts.at[other, wg], layout=plgpu.Layout.WGMMA, optimized=False)
                    return total

                opener = self.opener(tile)

                @pl.when(opener < cta)
                def _() -> None:
                    wait(flags, wg * self.ctas + opener, cta - opener)

                self.store(lax.fori_loop(opener, cta, add, acc), tile, wg, scales, out, outs)

        self.for_each_part(multiply_part)
        plgpu.wait_smem_to_gmem(0)

    def store(self, acc: jax.Array, tile: jax.Array, wg: Any, scales: Any, out: Any, outs: Any) -> None:
        """Scales, rounds and stores sums [features, rows] to out [rows, features]."""
        mine = self.config.cols // WARPGROUPS
        begin = pl.multiple_of(tile * self.config.cols + wg * mine, mine)
        if scales is not None:
            own = plgpu.load(scales.at[pl.ds(begin, mine)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            acc = acc * lax.broadcast_in_dim(own, acc.shape, [0])
        acc = acc.astype(out.dtype)
        for col in range(0, mine, CHUNK):
            for row in range(0, self.rows, CHUNK):
                height = min(CHUNK, self.rows - row)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the chunk before
                chunk = plgpu.layout_cast(acc[col : col + CHUNK, row : row + height], plgpu.Layout.WGMMA_TRANSPOSED)
                outs.at[wg, pl.ds(0, height)].T[...] = chunk
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(outs.at[wg, pl.ds(0, height)], out.at[pl.ds(row, height), pl.ds(begin + col, CHUNK)])


def signal(flags: Any, index: jax.Array) -> None:
    """Sets flags[index] to 1: what this warpgroup stored before is there for whoever waits for it."""

    def put(ctx: Any, flags: Any, index: Any) -> None:
        mgpu.warpgroup_barrier()
        with mgpu.when(_below(_thread(), _i32(1))):
            at = _at(flags, index.registers.item())
            mgpu.inline_ptx("st.release.gpu.global.u32 [$0], $1;", at, _i32(1), has_side_effects=True)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR))(put)(flags, index)


def wait(flags: Any, first: jax.Array, count: jax.Array) -> None:
    """Waits until `count` flags from `first` on are 1, and clears them; a thread of the warpgroup for each."""

    def get(ctx: Any, flags: Any, first: Any, count: Any) -> None:
        with mgpu.when(_below(_thread(), count.registers.item())):
            at = _at(flags, arith.addi(first.registers.item(), _thread()))
            mgpu.inline_ptx(
                """{
                    .reg .pred not_yet;
                    .reg .u32 flag;
                    AGAIN:
                    ld.acquire.gpu.global.u32 flag, [$0];
                    setp.eq.u32 not_yet, flag, 0;
                    @not_yet bra AGAIN;
                    st.relaxed.gpu.global.u32 [$0], $1;
                }""",
                at,
                _i32(0),
                has_side_effects=True,
            )
        mgpu.warpgroup_barrier()

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))(get)(flags, first, count)


def _i32(x: int) -> Any:
    return mgpu.c(x, ir.IntegerType.get_signless(32))


def _thread() -> Any:
    return arith.remui(mgpu.thread_idx(), _i32(THREADS))


def _below(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _at(ref: Any, index: Any) -> Any:
    return mgpu.getelementptr(mgpu.memref_ptr(ref), [index], ir.IntegerType.get_signless(32))
