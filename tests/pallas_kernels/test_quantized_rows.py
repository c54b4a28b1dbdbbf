"""Rows rounded to e4m3: the kernels' bits beside the plain reference's, in the interpreter here and on an NVIDIA GPU (-m gpu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.models.layers.mlp import ACTIVATIONS, IN_KERNELS
from jaxserve.pallas_kernels import quantized_rows
from jaxserve.pallas_kernels.quantized_rows import mosaic_gpu, mosaic_gpu_team, reference
from jaxserve.pallas_kernels.quantized_rows.mosaic_gpu_team import Config, choose_config
from tests.pallas_kernels.gpu_interpreter import store_warp_parts

Rounded = tuple[jax.Array, jax.Array]


def rows(num_rows: int, width: int) -> jax.Array:
    """Of very different sizes; one is zero, and one has a number that is none."""
    rng = np.random.default_rng([num_rows, width])
    x = rng.standard_normal((num_rows, width)) * 10.0 ** rng.uniform(-3, 3, (num_rows, 1))
    x[0], x[1, 7] = 0, np.nan
    return jnp.asarray(x, jnp.bfloat16)


def products(num_rows: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What goes into a gated activation: rows of gate and linear, and the scales of rows and of columns."""
    rng = np.random.default_rng(width)
    scales = jnp.asarray(rng.uniform(0.1, 2, (2, width)), jnp.float32)
    return rows(num_rows, 2 * width).reshape(-1, 2, width), jnp.asarray(rng.uniform(0.1, 2, num_rows), jnp.float32), scales


def bits(rounded: Rounded) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(jax.lax.bitcast_convert_type(rounded[0], jnp.uint8)), np.asarray(rounded[1])


def assert_alike(got: Rounded, want: Rounded, *, exact: bool) -> None:
    """Up to the last bits of float32 in sums, exponentials and a GPU's quotients, which now and then round the other way."""
    (values, scales), (wanted, wanted_scales) = bits(got), bits(want)
    assert got[0].dtype == reference.E4M3 and got[1].dtype == jnp.float32
    np.testing.assert_allclose(scales, wanted_scales, rtol=0 if exact else 1e-5)
    assert np.isnan(scales).tolist() == [False, True] + [False] * (len(scales) - 2)
    kept = ~np.isnan(scales)  # of the others, any bits of NaN will do
    assert np.isnan(np.asarray(got[0][1], np.float32)).all()
    assert np.mean(values[kept] != wanted[kept]) <= (0 if exact else 1e-3)


@pytest.mark.parametrize("width", [4096, 14336, 11008, 18944, 8960, 3072, 2560, 28672])
def test_widths_of_real_models_have_a_kernel(width: int) -> None:
    for num_rows, most in ((16, 1), (8192, 1), (8192, 2)):
        config = choose_config(num_rows, width, most)
        assert width % (config.warpgroups * config.vector * mosaic_gpu_team.THREADS) == 0 == num_rows % config.rows
    assert choose_config(16, width, 2).rows == 1, "few rows spread over all multiprocessors"


def test_other_widths_are_left_to_xla(caplog: pytest.LogCaptureFixture) -> None:
    x = rows(4, 24)
    assert_alike(quantized_rows.quantize(x, "mosaic_gpu"), reference.quantize(x), exact=True)
    assert "multiple of 256" in caplog.text


@pytest.mark.parametrize("config", [Config(2, 2, 1), Config(1, 4, 2)], ids=str)
def test_bits_in_the_interpreter(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu_team, "store_warp_parts", store_warp_parts)
    x, gain, gated = rows(4, 512), jnp.linspace(-2, 2, 512, dtype=jnp.bfloat16), products(4, 512)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        plain = mosaic_gpu.quantize(x, config)
        normed = mosaic_gpu.quantize_normed(x, gain, 1e-5, 1.0, config)
        silu = mosaic_gpu.quantize_gated(*gated, jax.nn.silu, config)
    assert not gpu_callbacks.get_races().races_found
    assert_alike(plain, reference.quantize(x), exact=True)
    assert_alike(normed, reference.quantize_normed(x, gain, 1e-5, 1.0), exact=False)
    assert_alike(silu, reference.quantize_gated(*gated, jax.nn.silu), exact=False)


def run(name: str, *arrays: Any, **options: Any) -> tuple[Rounded, Rounded]:
    """From the kernel, and from the reference."""
    made: list[Callable[..., Rounded]] = [getattr(mosaic_gpu, name), getattr(reference, name)]
    got, want = (jax.jit(lambda *a, f=f: f(*a, **options))(*arrays) for f in made)
    return got, want


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [16, 64, 512])
@pytest.mark.parametrize("width", [256, 4096, 11008, 14336])
def test_numbers_on_the_gpu(num_rows: int, width: int) -> None:
    x, gain = rows(num_rows, width), jnp.linspace(-2, 2, width, dtype=jnp.bfloat16)
    got, want = run("quantize", x)
    assert_alike(got, want, exact=False)
    np.testing.assert_array_equal(got[1], want[1])
    assert_alike(*run("quantize_normed", x, gain, eps=1e-5, offset=0.0), exact=False)
    for activation in IN_KERNELS:
        assert_alike(*run("quantize_gated", *products(num_rows, width), activation=ACTIVATIONS[activation]), exact=False)
