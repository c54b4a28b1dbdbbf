"""Latent attention's GPU kernel: some numbers in the interpreter, all numbers on an NVIDIA GPU (-m gpu, JAX_PLATFORMS=cuda,cpu)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_latent, reference
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_latent_kernel import LatentConfig, attend, check_latent, seat_rows
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import TILE, plan_decode, plan_prefill
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import ROWS
from tests.pallas_kernels.gpu_interpreter import interpreted
from tests.pallas_kernels.paged_cases import Shape, paged_case


def latent_case(heads: int, key_dim: int, queries: list[int], prefixes: list[int], **shape: Any) -> dict[str, Any]:
    """As paged_case has it; each row of the pool is key and value in one."""
    tokens = shape.pop("tokens", sum(queries))
    case = paged_case(7, Shape(heads=heads, kv_heads=1, head_dim=key_dim, **shape), queries, prefixes, tokens=tokens)
    case.pop("sinks")
    return case | {"q": case["q"].astype(jnp.bfloat16), "kv_pages": case["kv_pages"][:, :, :1].astype(jnp.bfloat16)}


def expected(case: dict[str, Any], value_dim: int) -> np.ndarray:
    clean = {name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for name, x in case.items()}
    with jax.default_device(jax.devices("cpu")[0]):
        want = reference.paged_attention(**jax.device_put(clean, jax.devices("cpu")[0]), scale=0.1, value_dim=value_dim)
    return np.asarray(want)[: int(case["query_start"][-1])]


def check(got: Any, want: np.ndarray) -> None:
    got = np.asarray(got, np.float32)[: len(want)]
    assert np.linalg.norm(got - want) < 4e-3 * np.linalg.norm(want)
    per_token = np.linalg.norm((got - want).reshape(len(want), -1), axis=1)
    assert (per_token < 2e-2 * np.linalg.norm(want.reshape(len(want), -1), axis=1)).all(), np.flatnonzero(per_token > 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "key_dim"), [(4, 128), pytest.param(72, 192, marks=pytest.mark.extra)])
def test_decode_in_the_interpreter(heads: int, key_dim: int) -> None:
    """Rows of one and of two splits, and an unused one; heads of one tile with idle rows, and of two."""
    case = latent_case(heads, key_dim, [1, 1], [99, 30], rows=3, max_pages=2, page_size=64, tokens=3)
    tiles, rows = seat_rows(heads)
    plan = plan_decode(case["kv_lens"], case["num_single_rows"], num_kv_heads=2 * tiles, max_len=128, split=64)
    q = case["q"].reshape(3, tiles, -1, key_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - q.shape[2]), (0, 0)))
    with interpreted():
        out = attend(
            q, case["kv_pages"][:, :, 0], case["page_tables"], plan, scale=0.1, value_dim=128, config=LatentConfig(ctas=1)
        )
        got = np.asarray(out, np.float32)[:, :, : heads // tiles].reshape(3, heads, 128)
    check(got, expected(case, 128))
    assert not got[2].any()


@pytest.mark.extra
def test_prefill_in_the_interpreter() -> None:
    """A chunk behind a prefix whose tiles begin before it and end behind it."""
    case = latent_case(16, 128, [1, 9], [5, 60], rows=3, max_pages=2, page_size=64, tokens=16)
    plan = plan_prefill(
        case["query_start"], case["kv_lens"], case["num_single_rows"], num_tokens=16, num_heads=TILE * 16 // ROWS, num_kv_heads=1
    )
    with interpreted():
        out = attend(
            case["q"][:, None], case["kv_pages"][:, :, 0], case["page_tables"], plan, scale=0.1, value_dim=128,
            config=LatentConfig(ctas=1),
        )  # fmt: skip
        got = np.asarray(out, np.float32)[:, 0]
    check(got[1:], expected(case, 128)[1:])


@pytest.mark.parametrize(
    ("heads", "key_dim", "value_dim", "dtype", "text"),
    [
        (16, 288, 256, jnp.bfloat16, "multiple of 64"),
        (16, 576, 512, jnp.float32, "bfloat16 or float16"),
        (65, 576, 512, jnp.bfloat16, "query heads"),
    ],
)
def test_refuses_what_it_cannot(heads: int, key_dim: int, value_dim: int, dtype: Any, text: str) -> None:
    with pytest.raises(NotImplementedError, match=text):
        check_latent(jnp.zeros((1, heads, key_dim), dtype), jnp.zeros((2, 16, 1, key_dim), dtype), value_dim)


MIXED = ([1, 1, 5, 130, 64, 2, 100], [300, 617, 0, 0, 100, 500, 37])
LENGTHS = [0, 62, 63, 64, 699, 1030, 1023, 511, 780]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 20, 128])
@pytest.mark.parametrize(("queries", "prefixes", "tokens"), [(*MIXED, 320), ([1] * 9, LENGTHS, 10)], ids=["mixed", "decode"])
def test_latents(heads: int, queries: list[int], prefixes: list[int], tokens: int) -> None:
    case = latent_case(heads, 576, queries, prefixes, tokens=tokens, rows=10, max_pages=70)
    first, second = (
        np.asarray(
            mosaic_gpu_latent.paged_attention(**_renamed(case), scale=0.1, value_dim=512, decode_only=tokens == 10), np.float32
        )
        for _ in range(2)
    )
    used = sum(queries)
    np.testing.assert_array_equal(first[:used], second[:used])
    check(first, expected(case, 512))


def _renamed(case: dict[str, Any]) -> dict[str, Any]:
    return {"pages" if name == "kv_pages" else name: x for name, x in case.items()}
