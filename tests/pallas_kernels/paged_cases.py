"""Random paged-attention problems, for the tests of every back end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 16
    max_pages: int = 24
    rows: int = 8


def paged_case(
    seed: int, shape: Shape, query_lens: list[int], prefixes: list[int], *, tokens: int, sinks: bool = False
) -> dict[str, Any]:
    """Arguments of paged_attention; unused pages and slots hold NaN. Rows with one query token must come first."""
    rng = np.random.default_rng(seed)
    kv_lens = [q + p for q, p in zip(query_lens, prefixes, strict=True)]
    pages_used = [-(-n // shape.page_size) for n in kv_lens]
    num_pages = sum(pages_used) + 5
    ids = rng.permutation(num_pages)
    kv = np.full((num_pages * shape.page_size, 2 * shape.kv_heads, shape.head_dim), np.nan, np.float32)
    tables = np.full((shape.rows, shape.max_pages), ids[-1], np.int32)
    for row, (length, used) in enumerate(zip(kv_lens, pages_used, strict=True)):
        tables[row, :used], ids = ids[:used], ids[used:]
        slots = (tables[row, :used, None] * shape.page_size + np.arange(shape.page_size)).ravel()[:length]
        kv[slots] = rng.standard_normal((length, *kv.shape[1:]))
    pad = [0] * (shape.rows - len(query_lens))
    return {
        "q": jnp.asarray(rng.standard_normal((tokens, shape.heads, shape.head_dim)), jnp.float32),
        "kv_pages": jnp.asarray(kv.reshape(num_pages, shape.page_size, *kv.shape[1:])),
        "page_tables": jnp.asarray(tables),
        "query_start": jnp.asarray(np.cumsum([0, *query_lens, *pad]), jnp.int32),
        "kv_lens": jnp.asarray([*kv_lens, *pad], jnp.int32),
        "num_single_rows": jnp.asarray(sum(n == 1 for n in query_lens), jnp.int32),
        "sinks": jnp.asarray(rng.standard_normal(shape.heads), jnp.float32) if sinks else None,
    }
