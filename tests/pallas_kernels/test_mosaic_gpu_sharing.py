"""Pages that rows have in common: which work items read them, and that the GPU kernel's bits do not depend on it."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_decode import decode
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_decode_kernel import DecodeConfig
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import JOINED, MANY_SPLITS, DecodePlan, plan_decode
from tests.pallas_kernels.gpu_interpreter import interpreted
from tests.pallas_kernels.paged_cases import Shape, paged_case

ROWS, PAGES, PAGE, SPLIT, SEATS = 8, 20, 32, 64, 3
LENGTH = PAGES * PAGE


@functools.partial(jax.jit, static_argnames="window")
def make_plan(tables: jax.Array, lens: jax.Array, num_rows: jax.Array, window: int | None = None) -> DecodePlan:
    options: dict[str, Any] = {"num_kv_heads": 2, "max_len": LENGTH, "split": SPLIT, "window": window}
    return plan_decode(lens, num_rows, page_tables=tables, seats=SEATS, fill=False, **options)


def items_of(tables: np.ndarray, lens: list[int], num_rows: int, window: int | None = None) -> list[tuple[list[int], list[int]]]:
    """Each item's fields and rows."""
    plan = make_plan(jnp.asarray(tables, jnp.int32), jnp.asarray(lens, jnp.int32), jnp.int32(num_rows), window)
    items = np.asarray(plan.items)[: int(plan.num_items[0])].tolist()
    shared = None if plan.shared_rows is None else np.asarray(plan.shared_rows)
    return [(i, [i[0]] if shared is None or i[7] == 1 else shared[i[6] : i[6] + i[7]].tolist()) for i in items]


def prefix_tables(rng: np.random.Generator, lens: list[int]) -> np.ndarray:
    """Tables as a prefix cache makes them: each row begins with some pages of one before, never with its last."""
    tables = rng.permutation(ROWS * PAGES).reshape(ROWS, PAGES)
    for row in range(1, ROWS):
        other = int(rng.integers(row))
        common = int(rng.integers((min(lens[row], lens[other]) - 1) // PAGE + 1)) if min(lens[row], lens[other]) else 0
        tables[row, :common] = tables[other, :common]
    return tables


def joined(length: int) -> int:
    """Below how many tokens what is left behind whole splits belongs to the last one."""
    return SPLIT // JOINED if length >= MANY_SPLITS * SPLIT else 0


lengths = st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths, st.integers(0, ROWS), st.integers(0, 2**31), st.booleans())
def test_each_row_reads_each_of_its_pages_once(lens: list[int], num_rows: int, seed: int, is_any: bool) -> None:
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 3, (ROWS, PAGES)) if is_any else prefix_tables(rng, lens)
    tokens = np.zeros((ROWS, LENGTH), int)
    readers: Counter[tuple[int, ...]] = Counter()
    for (row, first, last, split, count, *_), rows in items_of(tables, lens, num_rows):
        assert row == rows[0] and 1 <= len(rows) <= SEATS and len(set(rows)) == len(rows)
        pages = tables[row, first // PAGE : -(-last // PAGE)]
        for other in rows:
            tokens[other, first:last] += 1
            assert (tables[other, first // PAGE : -(-last // PAGE)] == pages).all()
        if len(rows) > 1:
            assert split < count - 1 and last - first == SPLIT
        if split < count - 1:
            readers[first, *pages.tolist()] += 1
    for row in range(ROWS):
        assert (tokens[row] == (np.arange(LENGTH) < lens[row] * (row < num_rows))).all()
    if not is_any:  # what has the same pages is read together
        want: Counter[tuple[int, ...]] = Counter()
        for row in range(num_rows):
            for first in range(0, lens[row] - SPLIT - joined(lens[row]), SPLIT):
                want[first, *tables[row, first // PAGE : (first + SPLIT) // PAGE].tolist()] += 1
        assert readers == {pages: -(-n // SEATS) for pages, n in want.items()}


def test_nothing_is_shared_under_a_window() -> None:
    tables = np.tile(np.arange(PAGES), (ROWS, 1))
    assert all(len(rows) == 1 for _, rows in items_of(tables, [LENGTH] * ROWS, ROWS, window=300))
    assert any(len(rows) > 1 for _, rows in items_of(tables, [LENGTH] * ROWS, ROWS))


@pytest.mark.extra
@pytest.mark.parametrize(
    ("group", "dtype", "options"),
    [(2, jnp.bfloat16, {"sinks": True}), (4, jnp.float8_e4m3fn, {"softcap": 3.0}), (7, jnp.bfloat16, {})],
)
def test_bits_are_the_same_in_the_interpreter(group: int, dtype: Any, options: dict[str, Any]) -> None:
    """Rows 0 and 1 have two splits in common, row 2 the first of them, and 4's second is that of 2."""
    shape = Shape(heads=group * 2, kv_heads=2, head_dim=64, page_size=64, max_pages=6, rows=6)
    case = paged_case(7, shape, [1] * 5, [199, 149, 329, 69, 139], tokens=6, sinks="sinks" in options)
    tables = case["page_tables"]
    tables = tables.at[1, :2].set(tables[0, :2]).at[2, 0].set(tables[0, 0])
    case["page_tables"] = tables.at[4, 1].set(tables[2, 1])
    q, pages = case["q"].astype(jnp.bfloat16), case["kv_pages"].astype(dtype)
    softcap, outs = options.get("softcap"), []
    for seats in (1, 64 // group):
        rows = {"num_kv_heads": 2, "max_len": 6 * 64, "split": 64, "page_tables": case["page_tables"], "seats": seats}
        plan = plan_decode(case["kv_lens"], case["num_single_rows"], **rows)
        config = DecodeConfig(ctas=1, stages=2, pairs=1)
        with interpreted():
            out = decode(q, pages, case["page_tables"], plan, case["sinks"], scale=0.1, softcap=softcap, config=config)
            outs.append(np.asarray(out, np.float32)[:5])
    np.testing.assert_array_equal(*outs)
    clean = case | {"q": q.astype(jnp.float32), "kv_pages": pages.astype(jnp.float32)}
    want = np.asarray(reference.paged_attention(**clean, scale=0.1, softcap=softcap))[:5]
    assert np.linalg.norm(outs[0] - want) < 4e-3 * np.linalg.norm(want)
