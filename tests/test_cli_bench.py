"""`jaxserve bench`: its files are its commands, and each runs at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxserve.cli_bench
from jaxserve.cli import main


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
