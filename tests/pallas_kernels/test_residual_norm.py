"""A product added to the residual stream and normalised: the kernel beside the plain reference, interpreted here and on a GPU (-m gpu)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.quantized_rows import mosaic_gpu_team
from jaxserve.pallas_kernels.quantized_rows.mosaic_gpu_team import Config
from jaxserve.pallas_kernels.residual_norm import add_and_normalize, mosaic_gpu, reference
from tests.pallas_kernels.gpu_interpreter import store_warp_parts

OPTIONS = {"eps": 1e-5, "offset": 1.0}


def case(parts: int, rows: int, width: int, *, is_scaled: bool) -> tuple[Any, ...]:
    """Arguments of add_and_normalize; one part is in bfloat16, as a product leaves it."""
    rng = np.random.default_rng([parts, width])
    residual, gain = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((rows, width), (width,)))
    products = jnp.asarray(rng.standard_normal((parts, rows, width)), jnp.bfloat16 if parts == 1 else jnp.float32)
    scales = jnp.asarray(rng.uniform(0.1, 2, rows), jnp.float32), jnp.asarray(rng.uniform(0.1, 2, width), jnp.float32)
    return (residual, products, gain, *(scales if is_scaled else (None, None)))


def added(residual: Any, parts: Any, gain: Any, row_scales: Any, scales: Any) -> np.ndarray:
    """The residual stream to the bit, in NumPy: what XLA compiles for a GPU need not round what lies between two operations."""
    product = np.zeros(parts.shape[1:], np.float32)
    for part in np.asarray(parts, np.float32):
        product += part
    if row_scales is not None:
        product = product * np.asarray(row_scales)[:, None] * np.asarray(scales)
    rounded = product.astype(jnp.bfloat16).astype(np.float32)
    return (np.asarray(residual, np.float32) + rounded).astype(jnp.bfloat16)


def assert_right(got: tuple[jax.Array, ...], arguments: tuple[Any, ...], rounds: bool) -> None:
    """The residual stream to the bit; its norm up to the order in which squares are added up, and what rounding makes of that."""
    stream = added(*arguments)
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), stream.astype(np.float32))
    gain, none = arguments[2], jnp.zeros((1, *stream.shape), jnp.bfloat16)
    want = reference.add_and_normalize(jnp.asarray(stream), none, gain, None, None, **OPTIONS, rounds=rounds)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for have, wanted in zip(got[1:], want[1:], strict=True):
        have, wanted = np.asarray(have, np.float32), np.asarray(wanted, np.float32)
        is_8_bits = rounds and have.ndim == 2
        np.testing.assert_allclose(have, wanted, rtol=0.13 if is_8_bits else 2**-7, atol=2**-9 if is_8_bits else 0)
        assert have.ndim == 1 or np.mean(have != wanted) < 0.01


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("is_scaled, parts", [(False, 3), (True, 1), (True, 2)])
def test_in_the_interpreter(rounds: bool, is_scaled: bool, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu_team, "store_warp_parts", store_warp_parts)
    arguments = case(parts, 3, 512, is_scaled=is_scaled)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = mosaic_gpu.add_and_normalize(*arguments, **OPTIONS, rounds=rounds, config=Config(2, 2, 1))
    assert not gpu_callbacks.get_races().races_found
    assert_right(got, arguments, rounds)


def test_other_widths_are_left_to_xla(caplog: pytest.LogCaptureFixture) -> None:
    arguments = case(2, 3, 24, is_scaled=True)
    got = add_and_normalize(*arguments, **OPTIONS, rounds=True, implementation="mosaic_gpu")
    assert_right(got, arguments, rounds=True)
    assert "multiple of 256" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("parts, rows, width", [(8, 64, 4096), (8, 16, 4096), (4, 64, 1024), (1, 512, 4096), (2, 300, 8192)])
def test_numbers_on_the_gpu(parts: int, rows: int, width: int, is_scaled: bool, rounds: bool) -> None:
    arguments = case(parts, rows, width, is_scaled=is_scaled)
    got = jax.jit(lambda *a: mosaic_gpu.add_and_normalize(*a, **OPTIONS, rounds=rounds))(*arguments)
    assert_right(got, arguments, rounds)
