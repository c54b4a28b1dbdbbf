"""`jaxserve bench serve`: what it sends, and that its figures are those of the requests."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from jaxserve import cli
from jaxserve.cli_bench.serve import Sample, percentile, summary
from tests.server.conftest import Serve
from tests.server.fake_engine import FakeEngine


def test_a_sweep(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(lambda prompt, i: "x" * 50)
    engine.default_sampling = {}
    url = serve(engine)
    files = [str(tmp_path / "results.json"), str(tmp_path / "results.svg")]
    flags = ["--request-rate", "50,200,inf", "--num-prompts", "12", "--input-len", "20", "--output-len", "8", "--prefix-len", "5"]
    assert cli.main(["bench", "serve", "--url", url, *flags, "--json", files[0], "--svg", files[1]]) == 0
    assert "ttft_ms p99" in capsys.readouterr().out
    results = json.loads(Path(files[0]).read_text())
    assert [result["request_rate"] for result in results] == [50, 200, "inf"]
    for result in results:
        assert (result["completed"], result["failed"]) == (12, 0)
        assert result["output_tokens_per_s"] == pytest.approx(12 * 8 / result["seconds"])
        assert result["ttft_ms"]["p50"] <= result["ttft_ms"]["p99"] <= result["e2e_ms"]["p99"]
    assert results[0]["seconds"] > 0.05
    assert len(engine.submitted) == 36
    prompts = [tuple(ids) for ids, _ in engine.submitted]
    assert (
        {len(prompt) for prompt in prompts} == {25} and len({prompt[:5] for prompt in prompts}) == 1 and len(set(prompts)) == 12
    )
    assert all(params.ignore_eos and params.max_tokens == 8 for _, params in engine.submitted)
    ET.parse(files[1])


def test_failures_are_counted(serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.queue_limit = 0
    assert cli.main(["bench", "serve", "--url", serve(engine), "--num-prompts", "3", "--request-rate", "inf"]) == 2
    assert "429" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--request-rate", "0"], ["--request-rate", "a"], ["--num-prompts", "0"], ["--url", "http://127.0.0.1:1"]]
)
def test_mistakes(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", *flags]) == 2
    assert "error: " in capsys.readouterr().err


def test_goodput() -> None:
    samples = [Sample(10, 11, ttft_s=0.1 * i, itl_s=[0.1] * 10, e2e_s=0.1 * i + 0.1 * (i + 1)) for i in range(10)]
    samples.append(Sample(10, error="429"))
    result = summary(samples, 1.0, seconds=10.0, slo_ttft_s=0.45, slo_tpot_s=0.035)
    assert (result["completed"], result["failed"], result["last_error"]) == (10, 1, "429")
    assert result["goodput_per_s"] == pytest.approx(0.3)  # TTFT lets five pass, TPOT (0.01, 0.02, ...) three
    assert summary(samples, 1.0, 10.0, math.inf, math.inf)["goodput_per_s"] == 1.0


def test_percentiles() -> None:
    values = np.random.default_rng(0).random(101).tolist()
    for p in (1, 50, 90, 99, 100):
        assert percentile(values, p) == np.percentile(values, p, method="inverted_cdf")
    assert percentile([], 50) == 0
