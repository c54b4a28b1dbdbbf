"""Runs a model through the functional core alone: chunked prefill, then paged decode, with the logits of every token."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.cache_layout import group_layers
from jaxserve.models.description import ModelDescription
from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.packing import NOBODY
from jaxserve.plan import PlanBuffer, PlanShape, apply_page_updates, step_batch, unpack
from jaxserve.runner import abstract_state
from jaxserve.sharding import Shardings, make_mesh
from jaxserve.step import Weights

PAGE = 16


@partial(jax.jit, static_argnames="shape")
def _read_plan(
    page_tables: jax.Array, last_tokens: jax.Array, packed: jax.Array, shape: PlanShape
) -> tuple[jax.Array, StepBatch]:
    plan = unpack(packed, shape)
    page_tables = apply_page_updates(page_tables, plan)
    return page_tables, step_batch(plan, page_tables, last_tokens, PAGE)


def paged_logits(
    model: ModelDescription,
    weights: Weights,
    tokens: np.ndarray,
    *,
    chunk: int,
    num_decoded: int,
    devices: int = 1,
    decode_alone: bool = True,
    num_nobodys: int = 0,
) -> np.ndarray:
    """Logits [B, n, V] of tokens [B, n], all rows in step: chunks of `chunk`, the last `num_decoded` one by one.

    Rows' pages are interleaved and out of order in the pool; layers are in groups, as the engine has them.

    Args:
        decode_alone: single tokens run in programs of their own size; otherwise in those of the chunks, as beside a prefill.
        num_nobodys: rows of one token that are nobody's, behind single tokens and before chunks.
    """
    num_rows, length = tokens.shape
    mesh = make_mesh(devices)
    shardings = Shardings(mesh)
    pages = -(-length // PAGE)
    layout = group_layers(model.cache_specs, length)
    entries = layout.num_tables * num_rows * pages
    sizes = entries + 1, PAGE, num_rows, pages
    abstract = abstract_state(layout.arrays, *sizes, model.abstract[0].dtype, shardings, num_tables=layout.num_tables)
    state = jax.tree.map(
        lambda x: jax.device_put(jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype), x.sharding),
        abstract,
    )
    last_tokens = jax.device_put(jnp.zeros(num_rows, jnp.int32), shardings.replicated)
    ids = np.random.default_rng(0).permutation(entries)

    runtime = Runtime("cpu", mesh, layout=layout)
    caches, page_tables = state.caches, state.page_tables
    logits = np.zeros((num_rows, length, model.vocab_size), np.float32)
    starts = [*range(0, length - num_decoded, chunk), *range(length - num_decoded, length)]
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        count = end - start
        width = num_rows * (1 if count == 1 and decode_alone else max(chunk, 16)) + num_nobodys
        buffer = PlanBuffer(PlanShape(width, num_rows + num_nobodys, width, entries), num_rows)
        first = 0 if count == 1 else num_nobodys
        row, token = slice(first, first + num_rows), slice(first, first + num_rows * count)
        buffer.num_single_rows[0] = num_nobodys + (num_rows if count == 1 else 0)
        buffer.token_ids[token] = tokens[:, start:end].ravel()
        buffer.row_slot[:], buffer.row_position[:], buffer.row_tokens[:] = NOBODY
        buffer.row_slot[row] = range(num_rows)
        buffer.row_position[row] = start
        buffer.row_tokens[row] = count
        if start == 0:
            buffer.page_index[:] = range(entries)
            buffer.page_id[:] = ids
        buffer.logit_rows[: num_rows * count] = range(first, first + num_rows * count)
        # As step.forward, but not as one program: each kind of layer is compiled once, by itself, for a third of the time.
        page_tables, batch = _read_plan(page_tables, last_tokens, buffer.packed, buffer.shape)
        out, caches = model.apply(weights, batch, caches, runtime)
        logits[:, start:end] = np.asarray(out)[: num_rows * count].reshape(num_rows, count, -1)
    return logits
