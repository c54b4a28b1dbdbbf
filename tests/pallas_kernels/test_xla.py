"""The blockwise XLA attention against the plain reference, and the page write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import pages_shape, reference, write_kv, xla
from tests.pallas_kernels.paged_cases import Shape, paged_case

OPTIONS: list[dict] = [{}, {"window": 20}, {"softcap": 5.0}, {"sinks": True}, {"window": 150, "softcap": 3.0}]
RARE: list[dict] = [
    *({"chunk": 40}, {"chunk": 130, "alibi": "float32"}, {"alibi": "bfloat16"}),
    *({"value_dim": 24}, {"value_dim": 32, "alibi": "float32"}),
]

ALIKE: list[tuple[list[int], list[int]]] = [([1, 1, 1], [0, 5, 300]), ([70, 3], [0, 129]), ([1], [0]), ([130], [63])]


@pytest.mark.slow
@pytest.mark.parametrize("page_size, options", [(n, o) for n in (16, 64) for o in OPTIONS] + [(16, o) for o in RARE])
@pytest.mark.parametrize(
    "query_lens, prefixes",
    [
        ([1, 1, 2, 65, 40], [17, 200, 1, 100, 0]),
        ([1, 1, 1, 1, 70, 3], [17, 200, -1, -1, 129, 0]),  # two rows of nobody's, without keys
        *(pytest.param(*case, marks=pytest.mark.extra) for case in ALIKE),
    ],
)
def test_matches_reference(page_size: int, options: dict, query_lens: list[int], prefixes: list[int]) -> None:
    options = dict(options)
    shape = Shape(page_size=page_size, max_pages=400 // page_size + 1)
    case = paged_case(1, shape, query_lens, prefixes, tokens=192, sinks=options.pop("sinks", False))
    if dtype := options.pop("alibi", None):
        case["alibi"] = jnp.asarray([0.5, 0.25, 0.0625, 0.01], dtype)
    want = reference.paged_attention(**case, scale=0.2, **options)
    got = jax.jit(lambda case: xla.paged_attention(**case, scale=0.2, **options))(case)
    used = np.repeat(np.array(prefixes) >= 0, query_lens)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got[: used.size][used], want[: used.size][used], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"value_dim": 24}, {"window": 100}])
def test_blocks_of_any_size(options: dict) -> None:
    case = paged_case(2, Shape(max_pages=26), [1, 1, 120, 2], [17, 390, 50, 3], tokens=128)
    want = reference.paged_attention(**case, scale=0.2, **options)
    got = xla.paged_attention(**case, scale=0.2, **options, blocks=xla.Blocks(queries=32, keys=64, single_keys=256))
    np.testing.assert_allclose(got[:124], want[:124], rtol=2e-5, atol=2e-5)


def test_neighbours_do_not_change_a_row() -> None:
    """Row 0 alone and row 0 beside longer rows give the same bits."""
    shape = Shape()
    attend = jax.jit(lambda case: xla.paged_attention(**case, scale=0.2))
    beside = paged_case(3, shape, [1, 1, 1], [40, 300, 9], tokens=8)
    alone = beside | {
        "kv_lens": beside["kv_lens"].at[1:].set(0),
        "query_start": jnp.minimum(beside["query_start"], 1),
        "num_single_rows": jnp.asarray(1, jnp.int32),
    }
    np.testing.assert_array_equal(attend(beside)[0], attend(alone)[0])


def test_write_kv_puts_tokens_in_place_and_drops_padding() -> None:
    pages = jnp.zeros(pages_shape(3, 4, 2, 8))
    k = jnp.arange(3 * 2 * 8, dtype=jnp.float32).reshape(3, 2, 8)
    slots = jnp.asarray([5, 11, 12], jnp.int32)  # 12 is one past the pool
    written = jax.jit(write_kv)(pages, k, -k, slots).reshape(12, 2, 2, 8)
    np.testing.assert_array_equal(written[5, :, 0], k[0])
    np.testing.assert_array_equal(written[11, :, 1], -k[1])
    assert int(jnp.count_nonzero(jnp.any(written != 0, axis=(1, 2, 3)))) == 2


def test_write_kv_saturates_8_bit_pages() -> None:
    pages = jnp.zeros(pages_shape(1, 4, 1, 8), jnp.float8_e4m3fn)
    k = jnp.full((1, 1, 8), 1e6)
    written = jax.jit(write_kv)(pages, k, -k, jnp.asarray([2], jnp.int32)).astype(jnp.float32)
    np.testing.assert_array_equal(written[0, 2, :, 0], [448, -448])


def test_8_bit_pages_are_attended_as_what_they_hold() -> None:
    case = paged_case(4, Shape(), [1, 1, 40], [5, 200, 17], tokens=64)
    pages = case["kv_pages"].astype(jnp.float8_e4m3fn)
    attend = jax.jit(lambda case: xla.paged_attention(**case, scale=0.2))
    want = attend(case | {"kv_pages": pages.astype(jnp.float32)})
    np.testing.assert_array_equal(attend(case | {"kv_pages": pages})[:42], want[:42])
