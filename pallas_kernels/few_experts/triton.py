"""The choice of experts for few tokens as one small kernel, where top-k, sums over groups and scatters are ten. One thread block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from jaxserve.pallas_kernels.few_experts.api import Score


def choose(
    score: Score,
    operands: Sequence[Array],
    num_used: Int[Array, " 1"],
    top_k: int,
    normalize: bool,
    eps: float,
    least: float,
    scale: float,
    interpret: bool,
) -> tuple[Array, ...]:
    """See api.choose: weights, blocks, experts and num_blocks."""
    num_tokens, num_experts = operands[0].shape[-2:]
    body = functools.partial(_choose, score=score, top_k=top_k, normalize=normalize, eps=eps, least=least, scale=scale)
    padded = pl.next_power_of_2(top_k)
    weights, blocks, experts, num_blocks = pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, padded), jnp.float32),
            jax.ShapeDtypeStruct((num_tokens, padded), jnp.int32),
            jax.ShapeDtypeStruct((num_experts,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=min(max(4, num_experts // 8), 32), num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(num_used, *operands)
    return weights[:, :top_k], blocks[:, :top_k], experts, num_blocks


def _choose(num_used: Any, *refs: Any, score: Score, top_k: int, normalize: bool, eps: float, least: float, scale: float) -> None:
    *operands, weights, blocks, experts, num_blocks = refs
    num_tokens, num_experts = operands[0].shape[-2:]
    in_use = lax.broadcasted_iota(jnp.int32, (num_tokens,), 0) < num_used[0]
    values, choice = (_bits(found) for found in score(*(_read(ref, in_use) for ref in operands)))
    column = lax.broadcasted_iota(jnp.int32, (num_tokens, num_experts), 1)

    # 1. The best again and again, which is left out then. All in integers, whose reductions over a warp are one instruction.
    left = choice ^ ((choice >> 31) & 0x7FFFFFFF)  # ordered as the floats are
    hits, found, wanted = [], [], jnp.zeros((num_tokens, num_experts), jnp.int32)
    for _ in range(top_k):
        best = jnp.max(left, axis=1)[:, None]
        hit = column == jnp.min(jnp.where(left == best, column, num_experts), axis=1)[:, None]
        hits.append(hit)
        found.append(lax.bitcast_convert_type(jnp.sum(jnp.where(hit, values, 0), axis=1), jnp.float32))
        left = jnp.where(hit, -(2**31), left)
        wanted = jnp.where(hit & in_use[:, None], 1, wanted)

    # 2. Blocks, in the experts' order.
    active = jnp.max(wanted, axis=0)
    block = jnp.cumsum(active) - active
    total = jnp.maximum(functools.reduce(jnp.add, found) + eps, least) if normalize else None
    of_token = [jnp.sum(jnp.where(hit, block[None], 0), axis=1) for hit in hits]
    weights[...] = _side_by_side([(weight if total is None else weight / total) * scale for weight in found], weights.shape)
    blocks[...] = jnp.where(in_use[:, None], _side_by_side(of_token, blocks.shape), -1)
    num_blocks[...] = jnp.sum(active, keepdims=True)
    plgpu.store(experts.at[block], lax.broadcasted_iota(jnp.int32, (num_experts,), 0), mask=active > 0)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _side_by_side(columns: Sequence[Array], shape: tuple[int, int]) -> Array:
    """An array of these columns, to be stored at once: a store of each would make all warps wait."""
    at = lax.broadcasted_iota(jnp.int32, shape, 1)
    whole = jnp.zeros(shape, columns[0].dtype)
    for j, column in enumerate(columns):
        whole = jnp.where(at == j, column[:, None], whole)
    return whole


def _read(ref: Any, in_use: Array) -> Array:
    """An operand, parts added up; of tokens not in use zeros, for which no memory is read."""
    if len(ref.shape) == 1:
        read: Array = ref[...]
        return read
    parts = [ref.at[np.int32(i)] for i in range(ref.shape[0])] if len(ref.shape) == 3 else [ref]
    mask = jnp.broadcast_to(in_use[:, None], ref.shape[-2:])
    return functools.reduce(jnp.add, [plgpu.load(part, mask=mask, other=0.0) for part in parts])
