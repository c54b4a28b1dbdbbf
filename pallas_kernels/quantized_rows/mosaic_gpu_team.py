"""A thread block that has one or two rows: its warpgroups keep their numbers in registers from the only read to the only write.

Between the two they tell each other the rows' sums of squares or largest values.
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
from jaxtyping import Array

from jaxserve.pallas_kernels.quantized_rows.mosaic_gpu_registers import WARPS, Combine, store_warp_parts
from jaxserve.pallas_kernels.quantized_rows.reference import E4M3, scale_of

plgpu: Any = _mosaic_gpu  # not typed

THREADS = 128  # of a warpgroup
MOST = {4: 56, 2: 96, 1: 96}  # numbers of a row that a thread keeps at most, by warpgroups: they share the registers
FEW_ROWS = 264  # up to which every row has a thread block of its own: two for each multiprocessor


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        warpgroups: of a thread block.
        vector: neighbouring numbers that a thread has.
        rows: of a thread block.
    """

    warpgroups: int
    vector: int
    rows: int


def choose_config(num_rows: int, width: int, most_rows: int = 1) -> Config:
    """As few numbers a thread as up to four warpgroups allow.

    Args:
        most_rows: of a thread block, which then reads what all rows share once.

    Raises:
        NotImplementedError: for a width that does not spread evenly over the threads, or too wide a one.
    """
    fits = [(w, v) for w in MOST for v in (4, 2) if width % (w * v * THREADS) == 0 and width <= w * MOST[w] * THREADS]
    if not fits:
        raise NotImplementedError(f"such rows are a multiple of 256 wide, {4 * MOST[4] * THREADS} at most; got {width}")
    warpgroups, vector = fits[0]
    is_small = width * most_rows <= warpgroups * MOST[4] * THREADS
    return Config(warpgroups, vector, most_rows if is_small and num_rows > FEW_ROWS and num_rows % most_rows == 0 else 1)


def rounded_rows(shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What Team.store_rounded fills."""
    return jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(shape[:1], jnp.float32)


def run(body: Callable[..., None], inputs: tuple[Array, ...], out_type: tuple[Any, ...], config: Config, exchanges: int) -> Any:
    """The results of a body that has a thread block for each `config.rows` rows of them.

    Args:
        exchanges: how many of them Team.exchange makes.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(out_type[0].shape[0] // config.rows,),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        scratch_types=[
            plgpu.SMEM((exchanges * config.rows * config.warpgroups * WARPS,), jnp.float32),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=exchanges),
        ],
    )(*inputs)


class Team:
    """The warpgroups of a thread block, each with its own part of the same rows."""

    def __init__(self, config: Config, width: int, shared: tuple[Any, ...]) -> None:
        self.config = config
        self.part = width // config.warpgroups
        self.wg = lax.axis_index("wg")
        first = lax.axis_index("block") * config.rows
        self.rows = [first + i for i in range(config.rows)]
        self.parts, self.barriers = shared
        self.exchanges = 0

    @property
    def mine(self) -> Any:
        return pl.ds(pl.multiple_of(self.wg * self.part, self.part), self.part)

    def load(self, row: Any) -> jax.Array:
        """This warpgroup's part of a row, in float32."""
        layout = plgpu.Layout.WG_STRIDED((self.part,), vec_size=self.config.vector)
        loaded: jax.Array = plgpu.load(row.at[self.mine], layout=layout)
        return loaded.astype(jnp.float32)

    def exchange(self, own: list[jax.Array], combine: Combine) -> list[jax.Array]:
        """What the numbers of each row come to, from those of all warps. Mosaic's reductions would do for one warpgroup alone."""
        i, self.exchanges = self.exchanges, self.exchanges + 1
        warps = WARPS * self.config.warpgroups
        for row, numbers in enumerate(own):
            store_warp_parts(numbers, self.parts, (i * len(own) + row) * warps + self.wg * WARPS, combine, self.config.vector)
        plgpu.barrier_arrive(self.barriers.at[i])
        plgpu.barrier_wait(self.barriers.at[i])
        parts = [[self.parts[(i * len(own) + row) * warps + warp] for warp in range(warps)] for row in range(len(own))]
        return [functools.reduce(jnp.add if combine == "add" else jnp.maximum, of_row) for of_row in parts]

    def store_rounded(self, rows: list[jax.Array], values: Any, scales: Any) -> None:
        """Rounds the rows and stores them with their scales."""
        largest = self.exchange([jnp.abs(row) for row in rows], "max")
        for at, row, of_row in zip(self.rows, rows, largest, strict=True):
            scale = scale_of(of_row)
            values[at, self.mine] = (row / scale).astype(E4M3)

            @pl.when(self.wg == 0)
            def _(at: Any = at, scale: Any = scale) -> None:
                scales[at] = scale
