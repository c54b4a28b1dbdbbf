"""Rows rounded to e4m3 on Hopper, with what makes them in front: a gated activation of a product, or an RMS norm."""

from collections.abc import Callable
from typing import Any

from jax import lax
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.quantized_rows.mosaic_gpu_team import Config, Team, choose_config, rounded_rows, run


def quantize(x: Float[Array, "T D"], config: Config | None = None) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """See reference.quantize."""
    config = config or choose_config(*x.shape)

    def quantize_rows(x: Any, values: Any, scales: Any, *shared: Any) -> None:
        team = Team(config, x.shape[1], shared)
        team.store_rounded([team.load(x.at[row]) for row in team.rows], values, scales)

    result: tuple[Array, Array] = run(quantize_rows, (x,), rounded_rows(x.shape), config, exchanges=1)
    return result


def quantize_normed(
    x: Float[Array, "T D"], gain: Float[Array, " D"], eps: float, offset: float, config: Config | None = None
) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """See reference.quantize_normed."""
    config = config or choose_config(*x.shape)

    def norm_quantize(x: Any, gain: Any, values: Any, scales: Any, *shared: Any) -> None:
        width = x.shape[1]
        team = Team(config, width, shared)
        rows = [team.load(x.at[row]) for row in team.rows]
        gains = team.load(gain)
        squares = team.exchange([row * row for row in rows], "add")
        normed = [row * lax.rsqrt(square / width + eps) * (gains + offset) for row, square in zip(rows, squares, strict=True)]
        team.store_rounded(normed, values, scales)

    result: tuple[Array, Array] = run(norm_quantize, (x, gain), rounded_rows(x.shape), config, exchanges=2)
    return result


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
        team = Team(config, width, shared)
        gate_scales, linear_scales = team.load(up_scales.at[0]), team.load(up_scales.at[1])
        hidden = []
        for row in team.rows:
            gate = team.load(up.at[row, 0]) * row_scales[row] * gate_scales
            linear = team.load(up.at[row, 1]) * row_scales[row] * linear_scales
            hidden.append(activation(gate) * linear)
        team.store_rounded(hidden, values, scales)

    result: tuple[Array, Array] = run(
        gate_quantize, (up, row_scales, scales), rounded_rows((num_rows, width)), config, exchanges=1
    )
    return result
