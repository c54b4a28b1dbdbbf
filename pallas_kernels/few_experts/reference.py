"""Experts of few tokens in plain jnp: the oracle of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.few_experts.api import Choice, Score


def choose(
    score: Score,
    operands: Sequence[Array],
    num_used: Int[Array, " 1"],
    top_k: int,
    *,
    normalize: bool = False,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
) -> Choice:
    """See api.choose."""
    scores, choice = score(*(x.sum(0) if x.ndim == 3 else x for x in operands))
    num_tokens, num_experts = scores.shape
    experts = jax.lax.top_k(choice, top_k)[1]
    weights = jnp.take_along_axis(scores, experts, axis=1)
    if normalize:
        weights /= jnp.maximum(jnp.sum(weights, axis=1, keepdims=True) + eps, least)
    in_use = (jnp.arange(num_tokens) < num_used)[:, None]
    active = jnp.zeros(num_experts + 1, bool).at[jnp.where(in_use, experts, num_experts)].set(True)[:-1]
    order = jnp.cumsum(active) - 1
    listed = jnp.nonzero(active, size=num_experts, fill_value=0)[0]
    return Choice(
        weights * scale, jnp.where(in_use, order[experts], -1).astype(jnp.int32), listed.astype(jnp.int32), jnp.sum(active)[None]
    )


def multiply(
    x: Float[Array, "rows K"], w: Float[Array, "E K M"], choice: Choice, activation: Callable[[Array], Array] | None = None
) -> Float[Array, "blocks*T N"]:
    """See api.multiply."""
    most, num_tokens = choice.most_blocks, choice.blocks.shape[0]
    rows = jnp.broadcast_to(x.reshape(-1, num_tokens, x.shape[1]), (most, num_tokens, x.shape[1]))
    out = jnp.einsum("btk,bkm->btm", rows, w[choice.experts[:most]], preferred_element_type=jnp.float32)
    if activation is not None:
        gate, up = jnp.split(out, 2, axis=-1)
        out = activation(gate) * up
    return out.reshape(most * num_tokens, -1).astype(x.dtype)
