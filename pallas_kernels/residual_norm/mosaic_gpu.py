"""A product added to the residual stream and normalised on Hopper: a thread block a row, each number read once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.quantized_rows.mosaic_gpu_team import Config, Team, choose_config, rounded_rows, run


def add_and_normalize(
    residual: Float[Array, "T D"],
    parts: Float[Array, "S T D"],
    gain: Float[Array, " D"],
    row_scales: Float[Array, " T"] | None = None,
    scales: Float[Array, " D"] | None = None,
    *,
    eps: float,
    offset: float,
    rounds: bool,
    config: Config | None = None,
) -> Any:
    """See api.add_and_normalize.

    Raises:
        NotImplementedError: for widths that choose_config refuses.
    """
    width = residual.shape[1]
    sizes = config or choose_config(*residual.shape)
    scaling = () if row_scales is None or scales is None else (row_scales, scales)

    def add_norm(residual: Any, parts: Any, gain: Any, *rest: Any) -> None:
        scaling_refs, (added, normed, *rest_out) = rest[: len(scaling)], rest[len(scaling) :]
        *row_scales_out, numbers, barriers = rest_out
        team = Team(sizes, width, (numbers, barriers))
        rows = []
        for row in team.rows:
            product = team.load(parts.at[0, row])
            for part in range(1, parts.shape[0]):
                product += team.load(parts.at[part, row])
            if scaling_refs:
                product = product * scaling_refs[0][row] * team.load(scaling_refs[1])
            total = team.load(residual.at[row]) + product.astype(jnp.bfloat16).astype(jnp.float32)
            total = total.astype(jnp.bfloat16)
            added[row, team.mine] = total
            rows.append(total.astype(jnp.float32))
        gains = team.load(gain)
        squares = team.exchange([row * row for row in rows], "add")
        wide = [row * lax.rsqrt(square / width + eps) * (gains + offset) for row, square in zip(rows, squares, strict=True)]
        if rounds:
            team.store_rounded(wide, normed, *row_scales_out)
            return
        for row, numbers in zip(team.rows, wide, strict=True):
            normed[row, team.mine] = numbers.astype(jnp.bfloat16)

    same = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    out_type = (same, *rounded_rows(residual.shape)) if rounds else (same, same)
    return run(add_norm, (residual, parts, gain, *scaling), out_type, sizes, exchanges=2 if rounds else 1)
