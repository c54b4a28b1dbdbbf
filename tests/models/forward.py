"""Runs a loaded model over whole prompts in one chunk each, through the real paged kernels, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.models.interface import Runtime, ShardingFor, StepBatch
from jaxserve.models.loading import ModelDescription, describe_model, load_weights, open_source
from jaxserve.runner import abstract_state
from jaxserve.sharding import Shardings, make_mesh

PAGE_SIZE = 16
Weights = tuple[jax.Array, ...]


def one_device(axes: object, shape: object) -> SingleDeviceSharding:
    """A ShardingFor without a mesh."""
    return SingleDeviceSharding(jax.devices()[0])


def open_and_load(
    path: Path | str, dtype: Any = jnp.float32, kv_repeat: int = 1, sharding_for: ShardingFor = one_device
) -> tuple[ModelDescription, Weights]:
    source = open_source(str(path))
    model = describe_model(source, dtype=dtype, kv_repeat=lambda heads: kv_repeat)
    return model, load_weights(source, model, sharding_for=sharding_for)


def prompts_batch(tokens: np.ndarray, logit_rows: Sequence[int] | None = None, padding: int = 0) -> tuple[StepBatch, int]:
    """A step that prefills all of tokens [B, length] from position 0, and the pages it needs; `padding` more tokens are nobody's."""
    num, length = tokens.shape
    pages = -(-length // PAGE_SIZE)
    positions = np.arange(length)
    starts = np.arange(num)[:, None] * pages * PAGE_SIZE
    rows = range(num * length) if logit_rows is None else logit_rows
    arrays = (
        np.pad(tokens.reshape(-1), (0, padding)),
        np.pad(np.tile(positions, num), (0, padding)),
        np.arange(num + 1) * length,
        np.full(num, length),
        np.arange(num * pages).reshape(num, pages),
        np.pad((starts + positions).reshape(-1), (0, padding), constant_values=np.iinfo(np.int32).max),
        np.array(0),
        np.arange(num),
        np.asarray(rows),
    )
    return StepBatch(*(jnp.asarray(a, jnp.int32) for a in arrays)), num * pages


def forward(
    model: ModelDescription,
    weights: Weights,
    tokens: np.ndarray,
    *,
    logit_rows: Sequence[int] | None = None,
    runtime: Runtime | None = None,
) -> np.ndarray:
    """Logits [B, length, V] of tokens [B, length]; [S, V] where only some rows are wanted."""
    batch, num_pages = prompts_batch(tokens, logit_rows)
    run = partial(model.apply, runtime=runtime or Runtime("cpu"))
    logits, _ = jax.jit(run)(weights, batch, empty_caches(model, num_pages, len(tokens)))
    return np.asarray(logits if logit_rows is not None else logits.reshape(*tokens.shape, -1))


def empty_caches(model: ModelDescription, num_pages: int, num_slots: int) -> tuple[jax.Array, ...]:
    dtype = model.abstract[0].dtype
    state = abstract_state(model.cache_specs, num_pages, PAGE_SIZE, num_slots, 1, dtype, Shardings(make_mesh(1)))
    return tuple(jnp.zeros(cache.shape, cache.dtype) for cache in state.caches)


def logit_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error as a share of the wanted logits' spread."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    return float(np.abs(got - wanted).max() / wanted.std())
