"""The GPU attention kernels: work lists and some numbers anywhere, all numbers on an NVIDIA GPU (-m gpu, JAX_PLATFORMS=cuda,cpu)."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu, mosaic_gpu_write, reference, write_kv
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import (
    ALIGN,
    BLOCK,
    TILE,
    max_row_splits,
    plan_decode,
    plan_prefill,
)
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_prefill import PrefillConfig, prefill
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import check_decode
from tests.pallas_kernels.gpu_interpreter import interpreted
from tests.pallas_kernels.paged_cases import Shape, paged_case

KV_HEADS = 2


def decode_items(lens: list[int], num_rows: int, **options: Any) -> list[list[int]]:
    make = jax.jit(functools.partial(plan_decode, num_kv_heads=KV_HEADS, **options))
    plan = make(jnp.asarray(lens, jnp.int32), jnp.int32(num_rows))
    assert not np.any(plan.arrivals)
    return np.asarray(plan.items)[: int(plan.num_items[0])].tolist()


@pytest.mark.parametrize("window", [None, 1, 64, 100, 1000])
@pytest.mark.parametrize("split", [64, 256, 512])
def test_decode_items_cover_what_a_row_sees_once(window: int | None, split: int) -> None:
    rng = np.random.default_rng(split)
    lens = [0, 1, 63, 64, 65, 511, 512, 513, 4096, *rng.integers(1, 4096, 20).tolist()]
    used = 25
    items = decode_items(lens, used, max_len=4096, window=window, split=split, fill=False)
    seen: dict[int, list[list[int]]] = {}
    for item in items:
        seen.setdefault(item[0], []).append(item[1:6])
    assert set(seen) == set(range(1, used))
    for row, parts in seen.items():
        parts.sort()
        first = max(0, lens[row] - window) if window else 0
        assert parts[0][0] == first // BLOCK * BLOCK
        assert parts[-1][1] == lens[row]
        assert [p[0] for p in parts[1:]] == [p[1] for p in parts[:-1]]  # no gap, no overlap
        assert [p[2] for p in parts] == list(range(len(parts)))
        assert all(p[0] % BLOCK == 0 and p[3] == len(parts) and p[4] == first for p in parts)
        assert len(parts) <= max_row_splits(len(lens), KV_HEADS)


def test_decode_items_fall_in_size_and_unused_rows_get_one() -> None:
    items = decode_items([700, 0, 100, 1024, 0, 300], 4, max_len=1024, split=256, fill=True)
    sizes = [last - first for _, first, last, *_ in items]
    assert sizes == sorted(sizes, reverse=True)
    assert Counter(item[0] for item in items) == {0: 3, 1: 1, 2: 1, 3: 4, 4: 1, 5: 1}
    assert decode_items([700, 0], 0, max_len=1024, fill=False) == []


def test_a_very_long_row_has_longer_splits_and_not_more() -> None:
    items = decode_items([1023, 2048, 4160, 40_000], 4, max_len=65_536)
    longest = {row: max(last - first for r, first, last, *_ in items if r == row) for row in range(4)}
    assert longest == {0: 256, 1: 256, 2: 256, 3: 2_368}  # 17 splits at most


def test_a_little_behind_many_splits_joins_the_last_one() -> None:
    lens = [8 * 256 + 63, 8 * 256 + 64, 7 * 256 + 63]
    items = decode_items(lens, 3, max_len=4096, split=256, fill=False)
    sizes = [[last - first for r, first, last, *_ in items if r == row] for row in range(3)]
    assert sizes == [[256] * 7 + [319], [256] * 8 + [64], [256] * 7 + [63]]


def test_a_row_is_cut_alike_in_any_batch() -> None:
    def cut(lens: list[int]) -> list[list[int]]:
        items = decode_items(lens, len(lens), max_len=8192)
        return sorted(item[1:] for item in items if item[0] == 2)

    assert cut([5, 900, 3000, 1]) == cut([8192, 8192, 3000, 8192])


@pytest.mark.parametrize("seed", range(4))
def test_prefill_items_cover_each_token_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    single, rows, heads = 3, 12, 4
    queries = [1] * single + rng.integers(2, [3, 40, 300, 2000][seed], rows - single - 2).tolist() + [0, 0]
    lens = [q + int(p) if q else 0 for q, p in zip(queries, rng.integers(0, 500, rows), strict=True)]
    starts = np.cumsum([0, *queries])
    make = jax.jit(functools.partial(plan_prefill, num_tokens=int(starts[-1]), num_heads=heads, num_kv_heads=KV_HEADS))
    plan = make(jnp.asarray(starts, jnp.int32), jnp.asarray(lens, jnp.int32), jnp.int32(single))
    items = np.asarray(plan.items)[: int(plan.num_items[0])]
    assert len(items) <= len(plan.items)
    count = np.zeros((int(starts[-1]), heads), int)
    for row, head, token, begin, end, position, length, _ in items:
        assert token % ALIGN == 0
        assert 0 <= begin < end <= TILE
        assert starts[row] <= token + begin
        assert token + end <= starts[row + 1]
        assert length == lens[row]
        assert position + (starts[row] - token) == lens[row] - queries[row]
        count[token + begin : token + end, head] += 1
    assert (count[single:] == 1).all()
    assert (count[:single] == 0).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "dtype", "text"),
    [
        (4, 2, 80, 16, jnp.bfloat16, "head_dim"),
        (4, 2, 128, 8, jnp.bfloat16, "page_size"),
        (4, 2, 128, 16, jnp.float32, "queries"),
        (65, 1, 128, 16, jnp.bfloat16, "query heads"),
    ],
)
def test_refuses_what_it_cannot(heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: Any, text: str) -> None:
    q = jnp.zeros((1, heads, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=text):
        check_decode(q, jnp.zeros((2, page_size, 2 * kv_heads, head_dim), dtype))


def reference_of(case: dict[str, Any], dtype: Any, **options: Any) -> np.ndarray:
    """What the tokens in use should attend to in pages of `dtype`."""
    clean = case | {
        "q": case["q"].astype(jnp.bfloat16).astype(jnp.float32),
        "kv_pages": case["kv_pages"].astype(dtype).astype(jnp.float32),
    }
    with jax.default_device(jax.devices("cpu")[0]):
        want = reference.paged_attention(**jax.device_put(clean, jax.devices("cpu")[0]), scale=0.1, **options)
    return np.asarray(want)[: int(case["query_start"][-1])]


@pytest.mark.extra
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.float8_e4m3fn, {"sinks": True}),
        (jnp.float8_e4m3fn, {"window": 100, "softcap": 3.0}),
        (jnp.bfloat16, {"window": 100}),
        (jnp.bfloat16, {"softcap": 3.0}),
    ],
)
def test_prefill_in_the_interpreter(dtype: Any, options: dict[str, Any]) -> None:
    shape = Shape(heads=1, kv_heads=1, head_dim=64, page_size=64, max_pages=4, rows=3)
    sinks = "sinks" in options
    options = {name: value for name, value in options.items() if name != "sinks"}
    case = paged_case(7, shape, [1, 70], [5, 130], tokens=72, sinks=sinks)
    rows = case["query_start"], case["kv_lens"], case["num_single_rows"]
    plan = plan_prefill(*rows, num_tokens=72, num_heads=1, num_kv_heads=1, window=options.get("window"))
    config = PrefillConfig(block=64, stages=1, staged=2, ctas=1)
    q, pages = case["q"].astype(jnp.bfloat16), case["kv_pages"].astype(dtype)
    with interpreted():
        out = prefill(
            q, pages, case["page_tables"], plan, case["sinks"], scale=0.1, softcap=options.get("softcap"), config=config
        )
        got = np.asarray(out, np.float32)
    want = reference_of(case, dtype, **options)
    assert np.linalg.norm(got[1:71] - want[1:]) < 4e-3 * np.linalg.norm(want[1:])


def run(case: dict[str, Any], dtype: Any, **options: Any) -> np.ndarray:
    """The kernels' result over pages of `dtype`, of the tokens in use; two runs must agree bit for bit."""
    case = case | {"q": case["q"].astype(jnp.bfloat16), "kv_pages": case["kv_pages"].astype(dtype)}
    used = int(case["query_start"][-1])
    attend = functools.partial(mosaic_gpu.paged_attention, **case, scale=0.1, **options)
    first, second = (np.asarray(attend()[:used], np.float32) for _ in range(2))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)
    return first


def check(shape: Shape, queries: list[int], prefixes: list[int], tokens: int, *, sinks: bool = False, dtype: Any = jnp.bfloat16,
          **options: Any) -> None:  # fmt: skip
    case = paged_case(7, shape, queries, prefixes, tokens=tokens, sinks=sinks)
    got = run(case, dtype, **options)
    options.pop("decode_only", None)
    want = reference_of(case, dtype, **options)
    used = sum(queries)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 4e-3, f"relative error {error}"
    per_token = np.linalg.norm((got - want).reshape(used, -1), axis=1)
    assert (per_token < 2e-2 * np.linalg.norm(want.reshape(used, -1), axis=1)).all(), np.flatnonzero(per_token > 0.1)


LLAMA = Shape(heads=16, kv_heads=4, head_dim=128, max_pages=50, rows=10)
LENGTHS = [0, 62, 63, 64, 699, 510, 511, 512, 780]
RAGGED = ([1, 1, 1, 5, 130, 64, 2, 100], [300, 0, 617, 0, 0, 100, 500, 37])
SHAPES = {
    "llama": LLAMA,
    "page64": Shape(heads=16, kv_heads=4, head_dim=128, page_size=64, max_pages=13, rows=10),
    "page128": Shape(heads=14, kv_heads=2, head_dim=128, page_size=128, max_pages=7, rows=10),
    "small": Shape(heads=14, kv_heads=2, head_dim=64, max_pages=50, rows=10),
    "mha": Shape(heads=8, kv_heads=8, head_dim=64, max_pages=50, rows=10),
    "gemma": Shape(heads=4, kv_heads=2, head_dim=256, max_pages=50, rows=10),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 100},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 300, "softcap": 3.0, "sinks": True},
}
PAIRS = [("llama", o) for o in OPTIONS] + [("small", "all"), ("gemma", "all"), *((s, "plain") for s in SHAPES if s != "llama")]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("shape", "options"), PAIRS)
def test_mixed(shape: str, options: str, dtype: Any) -> None:
    check(SHAPES[shape], *RAGGED, 320, dtype=dtype, **OPTIONS[options])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("shape", "options"), PAIRS)
def test_decode(shape: str, options: str, dtype: Any) -> None:
    check(SHAPES[shape], [1] * len(LENGTHS), LENGTHS, LLAMA.rows, dtype=dtype, decode_only=True, **OPTIONS[options])


@pytest.mark.gpu
@pytest.mark.parametrize("shares_pages", [False, True])
def test_rows_of_nobodys_change_nothing(shares_pages: bool) -> None:
    """Behind the rows with one token; what stands in their tokens' outputs is not said."""
    case = paged_case(7, LLAMA, [*[1] * 8, 130, 64], [300, 617, *[-1] * 6, 0, 100], tokens=208)
    case |= {"q": case["q"].astype(jnp.bfloat16), "kv_pages": case["kv_pages"].astype(jnp.bfloat16)}
    is_used = np.repeat(case["kv_lens"] > 0, np.diff(case["query_start"]))
    got = np.asarray(mosaic_gpu.paged_attention(**case, scale=0.1, shares_pages=shares_pages), np.float32)
    want = reference_of(case, jnp.bfloat16)[is_used]
    assert np.linalg.norm(got[: is_used.size][is_used] - want) < 4e-3 * np.linalg.norm(want)


def any_case(seed: int) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Any problem that the kernels serve, of rows with one token and others, and the pages' type and options."""
    rng = np.random.default_rng(seed)
    kv_heads, page_size = int(rng.integers(1, 5)), int(rng.choice([16, 32, 64, 128]))
    shape = Shape(
        heads=kv_heads * int(rng.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=int(rng.choice([64, 128, 256])),
        page_size=page_size,
        max_pages=1280 // page_size,
        rows=16,
    )
    queries = [1] * int(rng.integers(1, 12)) + rng.integers(2, 150, rng.integers(0, 5)).tolist()
    prefixes = rng.integers(0, 1100, len(queries)).tolist()
    case = paged_case(seed, shape, queries, prefixes, tokens=-(-sum(queries) // 8) * 8 + 8, sinks=bool(rng.integers(2)))
    tables = np.array(case["page_tables"])
    for row in range(1, len(queries)):  # whole pages that a row has in common with one before
        other = int(rng.integers(row))
        common = int(rng.integers(2)) * (min(prefixes[row], prefixes[other]) // page_size)
        tables[row, :common] = tables[other, :common]
    options = {name: value for name, value in (("window", int(rng.integers(1, 700))), ("softcap", 3.0)) if not rng.integers(3)}
    return case | {"page_tables": jnp.asarray(tables)}, rng.choice([jnp.bfloat16, jnp.float8_e4m3fn]), options


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [2, 4, 6, 7, 9, 11])
def test_any_shape(seed: int) -> None:
    """And the bits are the same where pages in common are read once."""
    case, dtype, options = any_case(seed)
    got = run(case, dtype, **options)
    want = reference_of(case, dtype, **options)
    assert np.linalg.norm(got - want) < 4e-3 * np.linalg.norm(want)
    np.testing.assert_array_equal(run(case, dtype, shares_pages=True, **options), got)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others() -> None:
    """Row 1's bits are the same beside short, long and no neighbours."""
    case = paged_case(3, LLAMA, [1] * 9, LENGTHS, tokens=10)
    outs = []
    for others in (case["kv_lens"], case["kv_lens"] // 3, case["kv_lens"] * 0):
        outs.append(run(case | {"kv_lens": others.at[4].set(case["kv_lens"][4])}, jnp.bfloat16, decode_only=True)[4])
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.gpu
def test_pages_before_the_window_are_not_read() -> None:
    case = paged_case(5, LLAMA, [1, 1, 40], [700, 350, 600], tokens=48)
    want = run(case, jnp.bfloat16, window=100)
    gone = [case["page_tables"][row, : max(0, first - 99) // 16] for row, first in enumerate((700, 350, 600))]
    pages = case["kv_pages"].at[jnp.concatenate(gone)].set(jnp.nan)
    np.testing.assert_array_equal(run(case | {"kv_pages": pages}, jnp.bfloat16, window=100), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(512, 8, 128), (24, 1, 64), (2048, 32, 64), (64, 16, 256)])
def test_page_write(tokens: int, kv_heads: int, head_dim: int, dtype: Any) -> None:
    rng = np.random.default_rng(tokens)
    k, v = (jnp.asarray(rng.standard_normal((tokens, kv_heads, head_dim)), jnp.bfloat16) for _ in range(2))
    pages = jnp.asarray(rng.standard_normal((200, 16, 2 * kv_heads, head_dim)), dtype)
    slots = rng.permutation(200 * 16)[:tokens].astype(np.int32)
    slots[::5] = np.iinfo(np.int32).max  # padding
    slots[3] = 200 * 16  # just past the pool
    want = write_kv(pages, k, v, jnp.asarray(slots), "xla")
    kv = jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, head_dim).astype(dtype)
    got = mosaic_gpu_write.write_kv(pages, kv, jnp.asarray(slots))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
