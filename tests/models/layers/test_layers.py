"""The layers against their formulas in numpy."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.interface import Runtime
from jaxserve.models.layers.linear import MANY_ROWS, OutputsFirst, linear
from jaxserve.models.layers.mlp import Mlp
from jaxserve.models.layers.norms import Norm
from jaxserve.models.layers.rope import inverse_frequencies, rotate, rotation
from jaxserve.models.spec import LinearScaling, Llama3Scaling, MlpSpec, NormSpec, RopeSpec
from tests.models.forward import prompts_batch

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rows", [5, MANY_ROWS])
def test_linear_contracts_leading_axes(rows: int) -> None:
    x, w, bias = normal(rows, 3, 4), normal(3, 4, 6, 7), normal(6, 7)
    wanted = np.einsum("tnh,nhab->tab", x, w) + bias
    np.testing.assert_allclose(linear(x, w, bias, contract=2), wanted, rtol=1e-5, atol=1e-5)
    turned = OutputsFirst(w.transpose(2, 3, 0, 1))
    np.testing.assert_allclose(linear(x, turned, bias, contract=2), wanted, rtol=1e-5, atol=1e-5)
    table = normal(9, 4)
    np.testing.assert_allclose(linear(x[:, 0], table, transpose=True), x[:, 0] @ table.T, rtol=1e-5, atol=1e-5)


def test_linear_keeps_the_input_dtype_unless_told() -> None:
    x, w = normal(2, 64).astype(jnp.bfloat16), normal(64, 8).astype(jnp.bfloat16)
    assert linear(x, w).dtype == jnp.bfloat16
    y = linear(x, w, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.asarray(x, np.float32) @ np.asarray(w, np.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind: Any, offset: bool) -> None:
    norm = Norm(16, NormSpec(kind=kind, eps=1e-3, unit_offset=offset, bias=kind == "layer"), jnp.float32)
    weight, bias, x = normal(16), normal(16), 3 * normal(4, 16) + 1
    norm.weight.set_value(weight)
    wanted = np.asarray(x)
    if kind == "layer":
        assert norm.bias is not None
        norm.bias.set_value(bias)
        wanted = wanted - wanted.mean(-1, keepdims=True)
    wanted = wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-3) * (weight + offset)
    np.testing.assert_allclose(norm(x), wanted + (bias if kind == "layer" else 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_mlp(gated: bool) -> None:
    mlp = Mlp(6, MlpSpec(dim=8, activation="gelu", gated=gated), jnp.float32)
    up, down, x = normal(6, 1 + gated, 8), normal(8, 6), normal(3, 6)
    mlp.up.set_value(up)
    mlp.down.set_value(down)
    hidden = np.asarray(x @ up[:, 0])
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    wanted = (hidden * (x @ up[:, 1]) if gated else hidden) @ down
    np.testing.assert_allclose(mlp(x, prompts_batch(np.zeros((1, 3), np.int64))[0], Runtime("cpu")), wanted, rtol=1e-4, atol=1e-5)


def test_rotation_turns_pairs_by_their_angles() -> None:
    """As complex numbers: pair (i, i + rotary_dim / 2) times e^(i angle); what is past rotary_dim stays."""
    spec = RopeSpec(theta=100.0, rotary_dim=8)
    positions = jnp.array([0, 1, 7])
    x = normal(3, 2, 12)
    got = np.asarray(rotate(x, rotation(spec, positions)))
    pairs = np.asarray(x[..., :4] + 1j * x[..., 4:8])
    angles = np.array([0, 1, 7])[:, None] * 100.0 ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(got[..., :8], np.concatenate((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def test_rotation_of_late_positions_is_exact_in_bfloat16_models() -> None:
    spec = RopeSpec(theta=1e4, rotary_dim=2)
    cos, _ = rotation(spec, jnp.array([100_000, 100_001]))
    np.testing.assert_allclose(cos[:, 0], np.cos([100_000.0, 100_001.0]), atol=1e-3)
    assert cos.dtype == jnp.float32


def test_scaled_frequencies() -> None:
    plain = inverse_frequencies(RopeSpec(theta=1e4, rotary_dim=64))
    linear_ = inverse_frequencies(RopeSpec(theta=1e4, rotary_dim=64, scaling=LinearScaling(factor=4.0)))
    np.testing.assert_allclose(linear_, plain / 4)
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=1024)
    llama3 = inverse_frequencies(RopeSpec(theta=1e4, rotary_dim=64, scaling=scaling))
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 1024 / 4, wavelengths > 1024
    np.testing.assert_allclose(llama3[short], plain[short])
    np.testing.assert_allclose(llama3[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any() and np.all((llama3 < plain) & (llama3 > plain / 8) | ~between)
