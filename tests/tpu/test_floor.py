"""The model of TPUs on paper: its counts are those of the models, and the document is what they give."""

from __future__ import annotations

import json

import pytest

from bench import tpu_floor
from tests.tpu.test_target import needs_libtpu

COUNTS = json.loads(tpu_floor.COUNTS.read_text())
PARAMETERS = {"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}


def test_the_document_is_what_the_counts_give() -> None:
    assert tpu_floor.render(COUNTS) == tpu_floor.DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("devices", [n for n in tpu_floor.DEVICES if n <= 8])  # 16 devices hold each kv head twice
@pytest.mark.parametrize("model", tpu_floor.MODELS)
def test_devices_share_all_weights_and_all_work(model: str, devices: int) -> None:
    config, parts = tpu_floor.config_of(model), COUNTS[model][str(devices)]
    weights = PARAMETERS[model] - config["vocab_size"] * config["hidden_size"]
    assert sum(part["weights"] for part in parts.values()) * devices == pytest.approx(2 * weights, rel=1e-3)
    assert sum(part["flops"] for part in parts.values()) * devices == pytest.approx(2 * weights * tpu_floor.ROWS, rel=0.01)
    sums = 2 * config["num_hidden_layers"] if devices > 1 else 0
    assert parts["layers"]["summed"] == sums * tpu_floor.ROWS * config["hidden_size"] * 2


def test_more_devices_are_faster_and_bigger_batches_slower() -> None:
    for chip in tpu_floor.CHIPS:
        model, by_devices = "llama-3.1-8b", []
        for devices in (1, 2, 4, 8):
            counts = COUNTS[model][str(devices)]
            small, large = (tpu_floor.floor(chip, model, devices, counts, rows, prefill=False).seconds for rows in (64, 256))
            assert small < large
            by_devices.append(small)
        assert by_devices == sorted(by_devices, reverse=True)


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.usefixtures("no_compile_cache")
def test_counting_again_gives_the_same() -> None:
    """Up to the few operations around kernels, which change with them."""
    counted = tpu_floor.count("llama-3.1-8b", 4)
    for part, counts in COUNTS["llama-3.1-8b"]["4"].items():
        assert counted[part] == pytest.approx(counts, rel=1e-3)
