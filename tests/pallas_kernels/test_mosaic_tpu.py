"""The TPU attention kernel, which writes pages too, in Pallas' TPU interpreter, which looks for races, against the reference."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.paged_attention import mosaic_tpu, mosaic_tpu_layout, reference
from jaxserve.pallas_kernels.paged_attention.mosaic_tpu_layout import VMEM_BYTES, choose_blocks, lanes_of, vmem_bytes
from tests.pallas_kernels.paged_cases import Shape, paged_case

DECODE = ([1, 1, 1], [0, 5, 300])
CHUNKS = ([70, 3], [0, 129])
MIXED = ([1, 1, 2, 65, 40], [17, 200, 1, 100, 0])
SHARED = ([1, 1, 80, 37, 3], [64, 200, 0, 64, 70])


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
    """The step's own rows are in no page before, and in their places afterwards; is_written: another layer has put them there."""
    query_lens, prefixes = lens
    tokens = shape.rows if lens is DECODE else 128
    case = paged_case(1, shape, query_lens, prefixes, tokens=tokens, sinks=options.pop("sinks", False))
    if (alibi := options.pop("alibi", None)) is not None:
        case["alibi"] = -jnp.linspace(0.01, 0.3, shape.heads).astype(alibi)
    if lens is SHARED:  # row 2 fills two pages, which rows before it and behind it read
        case["page_tables"] = case["page_tables"].at[jnp.array([0, 3, 4]), :2].set(case["page_tables"][2, :2])
    is_written, latent = options.pop("is_written", False), options.get("value_dim") is not None
    if latent:
        case["kv_pages"] = case["kv_pages"][:, :, :1]
    pages = case.pop("kv_pages").astype(dtype)
    want = reference.paged_attention(**case, kv_pages=pages.astype(jnp.float32), scale=0.2, **options)

    before, want_pages = (np.array(to_tpu(pages, latent), np.float32) for _ in range(2))
    new = np.full((tokens, *np.delete(before.shape, [0, 2])), np.nan, np.float32)
    is_known = np.ones((before.shape[0], shape.page_size), bool)
    for row, (count, start) in enumerate(zip(query_lens, prefixes, strict=True)):
        positions = np.arange(start, -(-(start + count) // shape.page_size) * shape.page_size)
        places = np.asarray(case["page_tables"])[row, positions // shape.page_size], positions % shape.page_size
        is_known[places] = np.arange(len(positions)) < count  # behind the last one there is nothing
        first = int(case["query_start"][row])
        mine = places[0][:count], slice(None), places[1][:count]
        new[first : first + count] = want_pages[mine]
        before[mine] = want_pages[mine] if is_written else np.nan
    # Copies run when they start, or when they are waited for: what is fetched too early, or too late, is wrong in one of them.
    mode: Literal["eager", "on_wait"] = "eager" if lens is SHARED else "on_wait"
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    attend = jax.jit(lambda case, *rest: mosaic_tpu.paged_attention(**case, scale=0.2, interpret=interpret, **options))
    case |= {
        "new": None if is_written else jnp.asarray(new, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16),
        "kv_pages": jnp.asarray(before, dtype),
    }
    got, got_pages = attend(case)
    assert not interpret_pallas_call.races.races_found
    used = sum(query_lens)
    np.testing.assert_allclose(got[:used], want[:used], rtol=2e-5, atol=2e-5)
    by_slot = np.asarray(got_pages, np.float32).swapaxes(1, 2)[is_known]
    np.testing.assert_array_equal(by_slot, want_pages.swapaxes(1, 2)[is_known])


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("lens", "dtype"),
    [
        (DECODE, jnp.float8_e4m3fn),
        (SHARED, jnp.bfloat16),
        pytest.param(DECODE, jnp.bfloat16, marks=pytest.mark.extra),
        pytest.param(SHARED, jnp.float8_e4m3fn, marks=pytest.mark.extra),
    ],
    ids=["decode, 8 bits", "mixed", "decode", "mixed, 8 bits"],
)
def test_matches_reference(lens: Any, dtype: Any) -> None:
    check(Shape(head_dim=64, page_size=32, max_pages=12), lens, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(3, 1, 128), *(pytest.param(*case, marks=pytest.mark.extra) for case in ((4, 4, 80), (2, 1, 256)))],
)
def test_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    check(Shape(heads, kv_heads, head_dim, page_size=64, max_pages=6), CHUNKS, jnp.float32)


OPTIONS = [
    {"sinks": True, "window": 20, "softcap": 5.0},
    {"chunk": 48, "alibi": jnp.float32, "is_written": True},
    {"value_dim": 40},
]
MORE_OPTIONS = [{"sinks": True, "window": 150}, {"alibi": jnp.bfloat16}]


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "options",
    [*OPTIONS, *(pytest.param(o, marks=pytest.mark.extra) for o in MORE_OPTIONS)],
    ids=[", ".join(o) for o in OPTIONS + MORE_OPTIONS],
)
def test_options(options: dict[str, Any]) -> None:
    heads = 1 if "value_dim" in options else 2
    check(Shape(kv_heads=heads, head_dim=64, page_size=32, max_pages=12), MIXED, jnp.float32, **options)


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
