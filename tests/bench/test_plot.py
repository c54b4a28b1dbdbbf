"""The plot of the measured cases: every case has a bar, and the newest run of a case counts."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import plot

VLLM = {
    "decode_b1": {"vllm_ms_per_step": 8.0, "floor_ms": 4.0},
    "prefill_16x4096": {"vllm_prompt_tok_s": 100.0, "ceiling_prompt_tok_s": 150.0},
    "shared_prefix": {"warm_req_s": 20.0},
}


def test_the_last_run_with_the_same_options_counts() -> None:
    runs = [
        {"options": {}, "cases": {"decode_b1": {"decode_ms_per_step": 8.0}, "shared_prefix": {"warm_req_s": 10.0}}},
        {"options": {}, "cases": {"decode_b1": {"decode_ms_per_step": 5.0}, "prefill_16x4096": {"prompt_tok_s": 80.0}}},
        {"options": {"kv_cache_dtype": "fp8"}, "cases": {"decode_b1": {"decode_ms_per_step": 1.0}}},
        {"options": {}, "cases": {"shared_prefix": {"cold": {"req_s": 5.0}, "warm": {"req_s": 30.0}}}},
    ]
    bars = {bar.name: bar for bar in plot.bars_of(runs, VLLM)}
    assert bars["decode, 1 request"].speed == pytest.approx(8 / 5) and bars["decode, 1 request"].floor == 2
    assert bars["prefill, 16 x 4,096"].speed == pytest.approx(0.8) and bars["prefill, 16 x 4,096"].floor == 1.5
    assert bars["shared prefix, warm"].speed == pytest.approx(1.5) and bars["shared prefix, warm"].floor is None


def test_all_that_was_measured_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = plot.OUT.read_text()
    monkeypatch.setattr(plot, "OUT", tmp_path / "plot.svg")
    plot.main()
    assert plot.OUT.read_text() == committed, "run python bench/plot.py"
    root = ET.parse(tmp_path / "plot.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(" against " in str(text) for text in texts) == 3 * len(plot.CASES)
