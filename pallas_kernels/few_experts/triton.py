"""The choice of experts for few tokens as one small kernel, where top-k, sums over groups and scatters are ten. One thread block."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int


def choose(
    scores: Float[Array, "T E"],
    choice: Float[Array, "T E"],
    num_used: Int[Array, " 1"],
    top_k: int,
    normalize: bool,
    eps: float,
    least: float,
    scale: float,
    interpret: bool,
) -> tuple[Array, ...]:
    """See api.choose: weights, blocks, experts and num_blocks."""
    num_tokens, num_experts = scores.shape
    body = functools.partial(_choose, normalize=normalize, eps=eps, least=least, scale=scale)
    found: list[Array] = pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, top_k), jnp.float32),
            jax.ShapeDtypeStruct((num_tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((num_experts,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=max(4, num_experts // 32), num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(scores, choice, num_used)
    return tuple(found)


def _choose(
    scores: Any, choice: Any, num_used: Any, weights: Any, blocks: Any, experts: Any, num_blocks: Any, *, normalize: bool, eps: float,
    least: float, scale: float,
) -> None:  # fmt: skip
    num_tokens, num_experts = scores.shape
    score, left = scores[...], choice[...]
    column = lax.broadcasted_iota(jnp.int32, (num_tokens, num_experts), 1)
    in_use = lax.broadcasted_iota(jnp.int32, (num_tokens,), 0) < num_used[0]

    # 1. The best again and again, which is left out then.
    hits, found, wanted = [], [], jnp.zeros((num_tokens, num_experts), jnp.int32)
    for _ in range(weights.shape[1]):
        hit = column == jnp.argmax(left, axis=1).astype(jnp.int32)[:, None]
        hits.append(hit)
        found.append(jnp.sum(jnp.where(hit, score, 0.0), axis=1))
        left = jnp.where(hit, -jnp.inf, left)
        wanted = jnp.where(hit & in_use[:, None], 1, wanted)

    # 2. Blocks, in the experts' order.
    active = jnp.max(wanted, axis=0)
    block = jnp.cumsum(active) - active
    total = jnp.maximum(functools.reduce(jnp.add, found) + eps, least) if normalize else None
    for j, (hit, weight) in enumerate(zip(hits, found, strict=True)):
        weights[:, j] = (weight if total is None else weight / total) * scale
        blocks[:, j] = jnp.where(in_use, jnp.sum(jnp.where(hit, block[None], 0), axis=1), -1)
    num_blocks[...] = jnp.sum(active, keepdims=True)
    plgpu.store(experts.at[block], lax.broadcasted_iota(jnp.int32, (num_experts,), 0), mask=active > 0)
