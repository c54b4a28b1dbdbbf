"""The simulator against times worked out by hand, and against itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.errors import ConfigError
from jaxserve.simulation.cost import CostModel, read_cost
from jaxserve.simulation.simulator import simulate
from jaxserve.simulation.trace import BLOCK_TOKENS, TraceRequest, read_trace

EXAMPLES = Path(__file__).parents[2] / "bench" / "simulation"

STEPS_ONLY = CostModel(
    name="a device for which every step takes 1 ms", source="made up", step_us=1000, row_us=0, token_us=0, context_us=0, pair_us=0,
    page_size=16, num_pages=256, max_num_seqs=8, max_num_batched_tokens=256, max_model_len=2048,
)  # fmt: skip


def request(arrival_ms: float, prompt: int, output: int, *ids: int) -> TraceRequest:
    return TraceRequest(timestamp=arrival_ms, input_length=prompt, output_length=output, hash_ids=ids)


def test_one_request_takes_a_step_for_each_token() -> None:
    report = simulate([request(5000, 20, 5)], STEPS_ONLY)
    assert report.steps == 5
    assert report.seconds == pytest.approx(0.005)
    assert report.ttft_ms.mean == pytest.approx(1) and report.itl_ms.p99 == pytest.approx(1)
    assert report.requests_per_s == pytest.approx(200) and report.total_tokens_per_s == pytest.approx(25 / 0.005)
    assert report.kv_waste == pytest.approx((12 + 11 + 10 + 9 + 8) / (5 * 32))  # of two pages, 20 to 24 tokens are there
    assert report.kv_use == report.kv_use_peak == 2 / 256


def test_every_part_of_the_cost_counts() -> None:
    """A prompt of 100 tokens, padded to the program's 256, then two decode steps of 8 rows, the smallest program."""
    cost = replace(STEPS_ONLY, row_us=10, token_us=2, context_us=3, pair_us=0.5)
    report = simulate([request(0, 100, 3)], cost)
    prefill = 1000 + 2 * 128 + 3 * 100 + 0.5 * (100 * 101 / 2)
    decodes = [1000 + 10 * 8 + 3 * 101, 1000 + 10 * 8 + 3 * 102]
    assert report.ttft_ms.mean == pytest.approx(prefill / 1e3)
    assert report.seconds == pytest.approx((prefill + sum(decodes)) / 1e6)


def test_a_request_waits_for_the_steps_in_flight() -> None:
    """It comes in the middle of the first step; the second is sent by then, so its prompt is in the third."""
    report = simulate([request(0, 10, 8), request(0.5, 10, 1)], STEPS_ONLY)
    assert report.ttft_ms.p99 == pytest.approx(2.5)
    assert report.seconds == pytest.approx(0.008)


def test_idle_time_passes() -> None:
    report = simulate([request(0, 10, 1), request(100, 10, 1)], STEPS_ONLY)
    assert report.seconds == pytest.approx(0.101)
    assert report.ttft_ms.p99 == pytest.approx(1)


def test_shared_blocks_are_found() -> None:
    trace = [request(0, 600, 2, 1), request(50, 600, 2, 1), request(100, 600, 2, 2), request(150, 600, 2)]
    report = simulate(trace, STEPS_ONLY)
    assert report.prefix_hit_rate == pytest.approx(BLOCK_TOKENS / (4 * 600))
    assert report.steps == 4 * 1 + 3 * 3 + 1  # 600 tokens are three steps of 256; the 88 that were not found are one
    assert simulate(trace, replace(STEPS_ONLY, enable_prefix_caching=False)).prefix_hit_rate == 0


def test_a_small_pool_preempts_and_all_end() -> None:
    cost = replace(STEPS_ONLY, num_pages=16, max_model_len=256)
    report = simulate([request(0, 40, 150) for _ in range(6)], cost)
    assert report.preemptions > 0
    assert (report.num_requests, report.kv_use_peak) == (6, 1)
    assert report.total_tokens_per_s * report.seconds == pytest.approx(6 * 190)


def test_windows_leave_room_for_others() -> None:
    """Three tables of which two keep only windows of 64 tokens."""
    trace = [request(0, 40, 150) for _ in range(6)]
    held = {}
    for windows in ((None,), (None, None, None), (None, 64, 64)):
        report = simulate(trace, replace(STEPS_ONLY, num_pages=300, max_model_len=256, windows=windows))
        assert (report.num_requests, report.preemptions) == (6, 0)
        held[windows] = round(report.kv_use_peak * 300)
    assert held == {(None,): 72, (None, None, None): 216, (None, 64, 64): 72 + 2 * 30}


def test_the_same_trace_gives_the_same_report() -> None:
    trace, cost = read_trace(EXAMPLES / "example.jsonl")[:60], read_cost(EXAMPLES / "qwen3-0.6b_h100.json")
    assert asdict(simulate(trace, cost)) == asdict(simulate(trace, cost))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: wanted a JSON object"),
        ('{"timestamp": 0, "input_length": 3}', "timestamp, input_length, output_length"),
        ('{"timestamp": 0, "input_length": 3, "output_length": "4"}', "numbers"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 4, "hash_ids": [-1]}', "whole numbers"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 4}', "at least one token"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 4, "model": "x"}', "wanted"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0.5, "input_length": 3, "output_length": 4, "hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_pages": 0}, "num_pages must be a whole number"),
        ({"step_us": -1}, "step_us must be microseconds"),
        ({"platform": "abacus"}, "platform must be"),
        ({"windows": [0]}, "windows must be a list"),
        ({"windows": []}, "windows must be a list"),
        ({"speed": 1}, "with the fields"),
    ],
)
def test_a_wrong_cost_model_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(asdict(STEPS_ONLY)))
    assert read_cost(path) == STEPS_ONLY
    path.write_text(json.dumps(asdict(STEPS_ONLY) | change))
    with pytest.raises(ConfigError, match=message):
        read_cost(path)


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2,000 tokens and gets 49 more.*2,048"):
        simulate([request(0, 2000, 49)], STEPS_ONLY)
    with pytest.raises(ConfigError, match=r"the pool has 10 pages.*may need 128"):
        simulate([request(0, 10, 10)], replace(STEPS_ONLY, num_pages=10))


def test_the_command_shows_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost, trace = tmp_path / "cost.json", tmp_path / "trace.jsonl"
    cost.write_text(json.dumps(asdict(STEPS_ONLY)))
    trace.write_text('{"timestamp": 0, "input_length": 20, "output_length": 5}\n')
    command = ["simulate", "--trace", str(trace), "--cost", str(cost)]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert main(command) == 0
    assert "time to first token" in capsys.readouterr().out
    assert main([*command[:-1], str(tmp_path / "none.json")]) == 2
    assert "cannot read the cost model" in capsys.readouterr().err
