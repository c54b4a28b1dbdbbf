"""gpt-oss as it is published, its experts in MXFP4: the same numbers as the formula gives with NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ModelLoadError
from jaxserve.models.loading import open_source
from tests.goldens import cases
from tests.models.forward import open_and_load

SIGNS, EXPONENTS = np.arange(16) >> 3, np.arange(16) >> 1 & 3
E2M1 = (1 - 2.0 * SIGNS) * np.where(
    EXPONENTS > 0, 2.0 ** (EXPONENTS - 1) * (1 + (np.arange(16) & 1) / 2), (np.arange(16) & 1) / 2
)
"""A sign, two bits of exponent (bias 1) and one of fraction (OCP Microscaling Formats 1.0, 5.3.3)."""

CONFIG = cases.read_config("gpt_oss") | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def quantised() -> tuple[cases.Tensors, cases.Tensors]:
    """The case's tensors with experts of random codes, and what they stand for."""
    rng, packed, plain = np.random.default_rng(0), {}, {}
    for name, tensor in cases.read_tensors("gpt_oss").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            codes = rng.integers(0, 16, (experts, outputs, inputs))
            scales = rng.integers(120, 126, (experts, outputs, inputs // 32))
            packed[name + "_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(*scales.shape, 16)
            packed[name + "_scales"] = scales.astype(np.uint8)
            numbers = E2M1[codes] * np.repeat(2.0 ** (scales - 127), 32, axis=-1)
            plain[name] = np.ascontiguousarray(numbers.swapaxes(1, 2), np.float32)
        else:
            packed[name] = plain[name] = tensor
    return packed, plain


def test_experts_are_dequantised(tmp_path: Path) -> None:
    packed, plain = quantised()
    got = open_and_load(cases.write_checkpoint(tmp_path / "four", "gpt_oss", config=CONFIG, tensors=packed))[1]
    want = open_and_load(cases.write_checkpoint(tmp_path / "plain", "gpt_oss", tensors=plain))[1]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_part_of_the_inputs(tmp_path: Path) -> None:
    """That begins and ends within a block."""
    packed, plain = quantised()
    source = open_source(str(cases.write_checkpoint(tmp_path, "gpt_oss", config=CONFIG, tensors=packed)))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    part = (slice(1, 3), slice(5, 60), slice(2, 7))
    np.testing.assert_array_equal(source.tensors[name].read(part).astype(np.float32), plain[name][part])


def test_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    packed, _ = quantised()
    del packed["model.layers.1.mlp.experts.down_proj_scales"]
    with pytest.raises(ModelLoadError, match="down_proj_blocks .* its scales None"):
        open_source(str(cases.write_checkpoint(tmp_path, "gpt_oss", config=CONFIG, tensors=packed)))


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    packed, _ = quantised()
    name = "model.layers.1.self_attn.q_proj.weight"
    packed[name] = packed[name].astype(np.uint8)
    with pytest.raises(ModelLoadError, match="q_proj.weight has dtype U8"):
        open_source(str(cases.write_checkpoint(tmp_path, "gpt_oss", config=CONFIG, tensors=packed)))
