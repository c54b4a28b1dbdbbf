"""Rope and page write in one kernel: its plumbing in the interpreter, with stand-ins for register code; all numbers on a GPU (-m gpu)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_rope, reference, rotate_and_write, write_kv
from tests.pallas_kernels.gpu_interpreter import interpreted

PAGES, PAGE_SIZE = 5, 4


def case(
    tokens: int, num_kv_heads: int, group: int, head_dim: int, *, is_scaled: bool, sums: tuple[int, ...] = ()
) -> tuple[Any, ...]:
    """Arguments of rotate_and_write; every third token has no slot, and unwritten slots hold ones.

    Args:
        sums: how many parts q, k and v are in.
    """
    rng = np.random.default_rng([tokens, head_dim])
    angles = rng.uniform(0, 6, (tokens, head_dim // 2))
    slots = rng.permutation(max(PAGES * PAGE_SIZE, tokens + 1))[:tokens]
    slots[::3] = 1 << 30
    pages = -(-max(PAGES * PAGE_SIZE, tokens + 1) // PAGE_SIZE)
    arrays = (
        jnp.asarray(
            rng.standard_normal((*sums, tokens, num_kv_heads, group + 2, head_dim)), jnp.float32 if sums else jnp.bfloat16
        ),
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
        jnp.ones((pages, PAGE_SIZE, 2 * num_kv_heads, head_dim), jnp.bfloat16),
        jnp.asarray(slots, jnp.int32),
    )
    if not is_scaled:
        return arrays
    scales = rng.uniform(0.5, 2, (num_kv_heads, group + 2, head_dim))
    return (*arrays, jnp.asarray(rng.uniform(0.5, 2, tokens), jnp.float32), jnp.asarray(scales, jnp.float32))


def assert_as_in_three_steps(arguments: tuple[Any, ...], got: tuple[jax.Array, jax.Array], **options: Any) -> None:
    """Up to the last bit, where a sum is rounded once more or less."""
    qkv, cos, sin, pages, slots, *scales = arguments
    if qkv.ndim == 5:  # XLA on a GPU may add up in another order
        qkv = jnp.asarray(functools.reduce(np.add, np.asarray(qkv)), jnp.bfloat16)
    q, k, v = reference.rotate_qkv(qkv, cos, sin, *(scales or (None, None)), **options)
    for have, want in zip(got, (q, write_kv(pages, k, v, slots)), strict=True):
        have, want = np.asarray(have, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(have, want, rtol=2**-7, atol=1e-5)
        assert np.mean(have != want) < 0.01


def norms(head_dim: int) -> dict[str, Any]:
    rng = np.random.default_rng(head_dim)
    return {
        "gains": tuple(jnp.asarray(rng.standard_normal(head_dim), jnp.bfloat16) for _ in range(2)),
        "eps": 1e-3,
        "offset": 1.0,
    }


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("is_scaled, sums", [(False, ()), (False, (2,)), (True, ()), (True, (3,))])
def test_in_the_interpreter(is_scaled: bool, has_norms: bool, sums: tuple[int, ...]) -> None:
    arguments, options = case(7, 2, 3, 16, is_scaled=is_scaled, sums=sums), norms(16) if has_norms else {}
    with interpreted():
        assert_as_in_three_steps(arguments, mosaic_gpu_rope.rotate_and_write(*arguments, **options), **options)


def test_other_types_are_left_to_xla(caplog: pytest.LogCaptureFixture) -> None:
    qkv, cos, sin, pages, slots = case(7, 2, 3, 16, is_scaled=False)
    small = pages.astype(jnp.float8_e4m3fn)
    q, written = rotate_and_write(qkv, cos, sin, small, slots, implementation="mosaic_gpu")
    wanted, k, v = reference.rotate_qkv(qkv, cos, sin, None, None)
    np.testing.assert_array_equal(np.asarray(q), np.asarray(wanted))
    np.testing.assert_array_equal(np.asarray(written), np.asarray(write_kv(small, k, v, slots)))
    assert "bfloat16" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), [(8, 4, 128), (2, 7, 64), (1, 1, 256), (3, 5, 80)])
@pytest.mark.parametrize("tokens, sums", [(16, ()), (16, (4,)), (300, ()), (300, (2,))])
def test_numbers_on_the_gpu(
    tokens: int, num_kv_heads: int, group: int, head_dim: int, is_scaled: bool, sums: tuple[int, ...]
) -> None:
    arguments = case(tokens, num_kv_heads, group, head_dim, is_scaled=is_scaled, sums=sums)
    for options in [{}, norms(head_dim)] if head_dim != 80 else [{}]:
        got = jax.jit(lambda *a, o=options: mosaic_gpu_rope.rotate_and_write(*a, **o))(*arguments)
        assert_as_in_three_steps(arguments, got, **options)
