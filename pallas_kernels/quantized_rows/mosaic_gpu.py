"""Rows rounded to e4m3 on Hopper, with what makes them in front: a gated activation of a product, or an RMS norm.

A thread block has one or two rows. Its threads keep their numbers in registers from the only read to the only write; between the
two they tell each other the row's sum of squares or largest value.
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
from jaxtyping import Array, Float

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
        raise NotImplementedError(f"rows to round are a multiple of 256 wide, {4 * MOST[4] * THREADS} at most; got {width}")
    warpgroups, vector = fits[0]
    is_small = width * most_rows <= warpgroups * MOST[4] * THREADS
    return Config(warpgroups, vector, most_rows if is_small and num_rows > FEW_ROWS and num_rows % most_rows == 0 else 1)


def quantize(x: Float[Array, "T D"], config: Config | None = None) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """See reference.quantize."""
    config = config or choose_config(*x.shape)

    def quantize_rows(x: Any, values: Any, scales: Any, *shared: Any) -> None:
        team = _Team(config, x.shape[1], shared)
        team.store([team.load(x.at[row]) for row in team.rows], values, scales)

    return _run(quantize_rows, (x,), x.shape, config, exchanges=1)


def quantize_normed(
    x: Float[Array, "T D"], gain: Float[Array, " D"], eps: float, offset: float, config: Config | None = None
) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """See reference.quantize_normed."""
    config = config or choose_config(*x.shape)

    def norm_quantize(x: Any, gain: Any, values: Any, scales: Any, *shared: Any) -> None:
        width = x.shape[1]
        team = _Team(config, width, shared)
        rows = [team.load(x.at[row]) for row in team.rows]
        gains = team.load(gain)
        squares = team.exchange([row * row for row in rows], "add")
        normed = [row * lax.rsqrt(square / width + eps) * (gains + offset) for row, square in zip(rows, squares, strict=True)]
        team.store(normed, values, scales)

    return _run(norm_quantize, (x, gain), x.shape, config, exchanges=2)


def quantize_gated(
    up: Float[Array, "T 2 F"],
    row_scales: Float[Array, " T"],
    scales: Float[Array, "2 F"],
    activation: Callable[[Array], Array],
    config: Config | None = None,
) -> tuple[Float[Array, "T F"], Float[Array, " T"]]:
    """See reference.quantize_gated."""
    num_rows, _, width = up.shape
    config = config or choose_config(num_rows, width, most_rows=2)

    def gate_quantize(up: Any, row_scales: Any, up_scales: Any, values: Any, scales: Any, *shared: Any) -> None:
        team = _Team(config, width, shared)
        gate_scales, linear_scales = team.load(up_scales.at[0]), team.load(up_scales.at[1])
        hidden = []
        for row in team.rows:
            gate = team.load(up.at[row, 0]) * row_scales[row] * gate_scales
            linear = team.load(up.at[row, 1]) * row_scales[row] * linear_scales
            hidden.append(activation(gate) * linear)
        team.store(hidden, values, scales)

    return _run(gate_quantize, (up, row_scales, scales), (num_rows, width), config, exchanges=1)


def _run(
    body: Callable[..., None], inputs: tuple[Array, ...], shape: tuple[int, ...], config: Config, exchanges: int
) -> tuple[Array, Array]:
    result: tuple[Array, Array] = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(shape[:1], jnp.float32)),
        grid=(shape[0] // config.rows,),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        scratch_types=[
            plgpu.SMEM((exchanges * config.rows * config.warpgroups * WARPS,), jnp.float32),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=exchanges),
        ],
    )(*inputs)
    return result


class _Team:
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

    def store(self, rows: list[jax.Array], values: Any, scales: Any) -> None:
        """Rounds the rows and stores them with their scales."""
        largest = self.exchange([jnp.abs(row) for row in rows], "max")
        for at, row, of_row in zip(self.rows, rows, largest, strict=True):
            scale = scale_of(of_row)
            values[at, self.mine] = (row / scale).astype(E4M3)

            @pl.when(self.wg == 0)
            def _(at: Any = at, scale: Any = scale) -> None:
                scales[at] = scale
