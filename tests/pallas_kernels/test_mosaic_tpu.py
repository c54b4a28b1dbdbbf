"""The TPU attention kernel and page write in Pallas' TPU interpreter, which looks for races, against the plain reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.paged_attention import mosaic_tpu, mosaic_tpu_layout, mosaic_tpu_write, reference
from jaxserve.pallas_kernels.paged_attention.mosaic_tpu_layout import VMEM_BYTES, choose_blocks, lanes_of, pages_shape, vmem_bytes
from tests.pallas_kernels.paged_cases import Shape, paged_case

DECODE = ([1, 1, 1], [0, 5, 300])
CHUNKS = ([70, 3], [0, 129])
MIXED = ([1, 1, 2, 65, 40], [17, 200, 1, 100, 0])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, each of them cheap to interpret."""
    monkeypatch.setattr(mosaic_tpu_layout, "KEY_BLOCK", 128)
    monkeypatch.setattr(mosaic_tpu_layout, "QUERY_ROWS", 32)


def to_tpu(kv_pages: jax.Array, is_latent: bool = False) -> jax.Array:
    """Pages in the TPU's layout."""
    pages, page_size, rows, _ = kv_pages.shape
    heads = rows if is_latent else rows // 2
    packed = kv_pages.reshape(pages, page_size, heads, -1).transpose(0, 2, 1, 3)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, 0), (0, lanes_of(packed.shape[-1]) - packed.shape[-1])))


def check(shape: Shape, lens: tuple[list[int], list[int]], dtype: Any, **options: Any) -> None:
    query_lens, prefixes = lens
    tokens = shape.rows if lens is DECODE else 128
    case = paged_case(1, shape, query_lens, prefixes, tokens=tokens, sinks=options.pop("sinks", False))
    if (alibi := options.pop("alibi", None)) is not None:
        case["alibi"] = -jnp.linspace(0.01, 0.3, shape.heads).astype(alibi)
    latent = options.get("value_dim") is not None
    if latent:
        case["kv_pages"] = case["kv_pages"][:, :, :1]
    pages = case["kv_pages"].astype(dtype)
    want = reference.paged_attention(**case | {"kv_pages": pages.astype(jnp.float32)}, scale=0.2, **options)
    interpret = pltpu.InterpretParams(detect_races=True)
    attend = jax.jit(lambda case: mosaic_tpu.paged_attention(**case, scale=0.2, interpret=interpret, **options))
    got = attend(case | {"kv_pages": to_tpu(pages, latent)})
    assert not interpret_pallas_call.races.races_found
    used = sum(query_lens)
    np.testing.assert_allclose(got[:used], want[:used], rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("lens", "dtype"),
    [
        (DECODE, jnp.float8_e4m3fn),
        (MIXED, jnp.bfloat16),
        pytest.param(DECODE, jnp.bfloat16, marks=pytest.mark.extra),
        pytest.param(MIXED, jnp.float8_e4m3fn, marks=pytest.mark.extra),
    ],
    ids=["decode, 8 bits", "mixed", "decode", "mixed, 8 bits"],
)
def test_matches_reference(lens: Any, dtype: Any) -> None:
    check(Shape(head_dim=64, page_size=32, max_pages=12), lens, dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 80), *(pytest.param(*case, marks=pytest.mark.extra) for case in ((3, 1, 128), (2, 1, 256)))],
)
def test_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    check(Shape(heads, kv_heads, head_dim, page_size=64, max_pages=6), CHUNKS, jnp.float32)


OPTIONS = [{"sinks": True, "window": 20, "softcap": 5.0}, {"chunk": 48, "alibi": jnp.float32}, {"value_dim": 40}]
MORE_OPTIONS = [{"sinks": True, "window": 150}, {"alibi": jnp.bfloat16}]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "options",
    [*OPTIONS, *(pytest.param(o, marks=pytest.mark.extra) for o in MORE_OPTIONS)],
    ids=[", ".join(o) for o in OPTIONS + MORE_OPTIONS],
)
def test_options(options: dict[str, Any]) -> None:
    heads = 1 if "value_dim" in options else 2
    check(Shape(kv_heads=heads, head_dim=64, page_size=32, max_pages=12), MIXED, jnp.float32, **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, pytest.param(jnp.float32, marks=pytest.mark.extra)])
def test_page_write(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.standard_normal(pages_shape(6, 64, 2, 80)), dtype)
    rows = jnp.asarray(rng.standard_normal((100, 2, 80)), jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    slots = np.full(100, np.iinfo(np.int32).max, np.int32)
    slots[:3] = 5, 127, 131  # decode rows
    slots[3:73] = np.arange(70) + 3 * 64 + 7  # a chunk over two pages
    slots[73:96] = np.arange(23) + 2 * 64 + 17
    slots[96] = 6 * 64  # just past the pool; the rest is padding, and may be NaN
    rows = rows.at[97:].set(jnp.nan)
    write = jax.jit(lambda *args: mosaic_tpu_write.write_rows(*args, interpret=pltpu.InterpretParams(detect_races=True)))
    got = write(pages, rows, jnp.asarray(slots))
    assert not interpret_pallas_call.races.races_found
    want = np.asarray(pages, np.float32).copy()
    for row, slot in zip(rows[:96], slots[:96], strict=True):
        want[slot // 64, :, slot % 64] = np.pad(np.asarray(row.astype(dtype), np.float32), ((0, 0), (0, 48)))
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


@pytest.mark.parametrize("page_size", [32, 64, 256])
@pytest.mark.parametrize(
    ("kv_heads", "group", "lanes"),
    [(8, 4, 256), (1, 8, 256), (32, 1, 256), (1, 128, 640), (8, 8, 512), (1, 71, 128), (16, 1, 512)],
)
def test_blocks_fit_vmem(kv_heads: int, group: int, lanes: int, page_size: int) -> None:
    for decode in (True, False):
        for itemsize in (1, 2):
            blocks = choose_blocks(kv_heads, group, lanes, page_size, itemsize, decode=decode)
            assert vmem_bytes(blocks, kv_heads, group, lanes, itemsize) <= VMEM_BYTES
            assert blocks.key % page_size == 0 and blocks.query & (blocks.query - 1) == 0
            assert (blocks.query == 1) == decode


def test_what_fits_no_tpu_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit a TPU's VMEM"):
        choose_blocks(128, 1, 1024, 256, 2, decode=False)
