"""`jaxserve bench`: its files are its commands, and each runs at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jaxserve.cli_bench
from jaxserve import LLM
from jaxserve.cli import main, make_parser
from jaxserve.cli_bench.offline import Offline
from jaxserve.errors import ConfigError
from tests.goldens import cases
from tests.tiny import tiny_engine

SIZES = ["--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--num-gpu-blocks-override", "40"]


def test_each_file_is_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for file in Path(jaxserve.cli_bench.__file__).parent.glob("[!_]*.py"):
        assert f"    {file.stem.replace('_', '-')} " in shown


def test_load_reads_a_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "load", "--gb", "0.012", "--folder", str(tmp_path), "--repeats", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gb"] == pytest.approx(0.012, abs=0.003)
    assert result["load_gb_s"] > 0 and result["read_gb_s"] > 0
    assert not list(tmp_path.iterdir()), "the checkpoint is left behind"


def spec(**changes: Any) -> dict[str, Any]:
    """Cases of every kind, at a small size."""
    fixed = {"kind": "fixed", "batch": 2, "in_len": 8, "out_len": 5, "probe_out1": True, "repeats": 2}
    lengths = {"mean_in": 9, "sigma_in": 0.5, "mean_out": 4, "sigma_out": 0.5, "clip_lo": 2, "clip_hi": 20, "len_seed": 0}
    shared = {"kind": "shared_prefix", "prefix_len": 32, "suffix_len": 4, "out_len": 2, "n": 3, "repeats": 1}
    listed = [
        {"name": "decode", "case_index": 0} | fixed,
        {"name": "prefill", "case_index": 1} | fixed | {"out_len": 1},
        {"name": "mixed", "case_index": 2, "kind": "mixed", "n": 6, "warmup_n": 2, "repeats": 1} | lengths,
        {"name": "shared", "case_index": 3} | shared,
    ]
    return {"seed": 0, "token_lo": 3, "token_hi": 60, "engine": {"dtype": "float32"}, "cases": listed} | changes


def write_model(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(cases.read_config("llama")))
    return folder


def test_offline_measures_cases_by_their_definitions() -> None:
    with LLM.from_engine(tiny_engine()) as llm:
        offline = Offline(llm, spec())
        decode, prefill, mixed, shared = (offline.measure(case) for case in spec()["cases"])
    t, t1 = (sum(decode[name]) / 2 for name in ("T", "T1"))  # the median of two
    assert decode["decode_ms_per_step"] == pytest.approx((t - t1) / 4 * 1000)
    assert decode["decode_tok_s"] == pytest.approx(2 * 4 / (t - t1))
    assert prefill["prompt_tok_s"] == pytest.approx(2 * 8 / (sum(prefill["T"]) / 2))
    assert mixed["req_s"] == pytest.approx(6 / mixed["T"][0])
    assert shared["warm"]["total_tok_s"] == pytest.approx(3 * (32 + 4 + 2) / shared["warm"]["T"][0])


@pytest.mark.extra
def test_offline_writes_what_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(spec()))
    files = ["--cases", str(tmp_path / "cases.json"), "--output", str(tmp_path / "out.json"), "--only", "prefill,shared"]
    assert main(["bench", "offline", str(write_model(tmp_path)), *files, *SIZES]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["cases"].keys() == {"prefill", "shared"}
    assert {"machine", "date", "commit", "command", "engine_start_s"} <= result.keys()


@pytest.mark.parametrize(
    "changed, only, said",
    [
        ({"seed": "x"}, None, "seed is missing or no int"),
        ({"cases": [{"name": "a", "kind": "odd"}]}, None, r"a kind \(fixed, mixed, shared_prefix\)"),
        ({}, "decode,other", "there is no case 'other'; the file has decode, prefill, mixed, shared"),
    ],
)
def test_what_is_wrong_with_cases_is_said_at_once(
    changed: dict[str, object], only: str | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(spec(**changed)))
    args = make_parser().parse_args(["bench", "offline", "m", "--cases", str(tmp_path / "cases.json")])
    args.only = only
    with pytest.raises(ConfigError, match=said):
        args.run(args)


@pytest.mark.extra
def test_startup_times_the_phases_of_both_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, options = tmp_path / "out.json", ["--load-format", "dummy", "--skip-tokenizer-init", *SIZES]
    assert main(["bench", "startup", str(write_model(tmp_path)), "--output", str(output), *options]) == 0
    assert output.read_text() == capsys.readouterr().out
    starts = json.loads(output.read_text())["starts"]
    assert len(starts) == 2
    for start in starts:
        marks = [start[name + "_at_s"] for name in ("imported", "first_program", "programs", "ready", "first_token")]
        assert marks[0] > 0 and marks == sorted(marks) and start["weights_at_s"] <= start["ready_at_s"]
        assert start["programs"] > 5
    assert starts[1]["compiled_for_s"] < starts[0]["compiled_for_s"]
