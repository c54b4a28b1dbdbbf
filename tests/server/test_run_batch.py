"""run_batch: a file of requests becomes a file of responses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve import cli
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.server.run_batch import run_batch
from tests.server.fake_engine import MODEL, FakeEngine

CHAT = "/v1/chat/completions"


def line(custom_id: str, url: str = CHAT, **body: Any) -> str:
    body = body or {"messages": [{"role": "user", "content": custom_id}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": MODEL} | body})


def answers(
    tmp_path: Path, lines: list[str], engine: FakeEngine, concurrency: int = 4
) -> tuple[list[Any], list[tuple[int, int]]]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    progress: list[tuple[int, int]] = []
    counts = run_batch(engine, source, target, concurrency=concurrency, on_progress=lambda *now: progress.append(now))
    entries = [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]
    assert counts.completed + counts.failed == len(entries)
    return entries, progress


def test_every_line_is_answered(tmp_path: Path) -> None:
    engine = FakeEngine()
    lines = [line(f"r{i}") for i in range(50)] + [line("text", "/v1/completions", prompt="abc")]
    entries, progress = answers(tmp_path, lines, engine)
    by_id = {entry["custom_id"]: entry["response"] for entry in entries}
    assert len(by_id) == 51 and all(response["status_code"] == 200 for response in by_id.values())
    assert by_id["r7"]["body"]["choices"][0]["message"]["content"] == "user: r7\nassistant: "
    assert by_id["text"]["body"]["choices"][0]["text"] == "abc"
    assert progress[-1] == (51, 51) and engine.is_shut_down and not engine.running


def test_a_bad_line_fails_alone(tmp_path: Path) -> None:
    engine = FakeEngine()
    lines = [
        line("good"), "{", "[]", "[" * 50_000, line("good"), line("where", "/v1/embeddings"), line("stream", prompt="a", stream=True),
        line("range", messages=[{"role": "user", "content": "a"}], temperature=-1), line("type", "/v1/completions", prompt=5),
        line("other", "/v1/completions", prompt="a", model="other"), json.dumps({"custom_id": "none", "url": CHAT}),
    ]  # fmt: skip
    entries, _ = answers(tmp_path, lines, engine)
    assert len(entries) == len(lines)
    statuses = {e["custom_id"]: e["response"]["status_code"] for e in entries if e["response"] is not None}
    assert statuses == {"good": 200, "stream": 400, "range": 400, "type": 400, "other": 404, "none": 400}
    assert sorted(e["error"]["message"][:14] for e in entries if e["error"]) == [
        "a line must be", "a request must", "custom_id 'goo", "the line is no", "the line is no",
    ]  # fmt: skip


def test_no_more_than_so_many_at_once(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.queue_limit = 3
    entries, _ = answers(tmp_path, [line(f"r{i}") for i in range(20)], engine, concurrency=3)
    assert {entry["response"]["status_code"] for entry in entries} == {200}


def test_files(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    with pytest.raises(ConfigError, match=r"in\.jsonl: No such file"):
        run_batch(FakeEngine(), source, tmp_path / "out", concurrency=1)
    source.write_text(line("a"))
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ConfigError, match="it exists"):
        run_batch(FakeEngine(), source, tmp_path / "out", concurrency=1)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("{folder}/in.jsonl {folder}/out.jsonl", MODEL),  # the requests name it
        ("other {folder}/in.jsonl {folder}/out.jsonl", "other"),
        ("{folder}/in.jsonl {folder}/out.jsonl --config {folder}/config.yaml", "configured"),
        ("other --input {folder}/in.jsonl --output {folder}/out.jsonl", "other"),
        ("--input {folder}/in.jsonl --output {folder}/out.jsonl", MODEL),
    ],
)
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, model: str) -> None:
    (tmp_path / "in.jsonl").write_text(line("a"))
    (tmp_path / "config.yaml").write_text("model: configured")
    loaded: list[EngineConfig] = []

    def load(config: EngineConfig) -> FakeEngine:
        loaded.append(config)
        engine = FakeEngine()
        engine.config = replace(engine.config, scheduler=replace(engine.config.scheduler, max_num_seqs=4))
        return engine

    monkeypatch.setattr(cli, "_load", load)
    assert cli.main(["run-batch", *words.format(folder=tmp_path).split()]) == 0
    assert loaded[0].model.model == model
    assert json.loads((tmp_path / "out.jsonl").read_text())["response"]["status_code"] == 200


@pytest.mark.parametrize(
    "words", ["in.jsonl", "a b c d", "model --input in.jsonl", "model in.jsonl out.jsonl --input x", "empty.jsonl out.jsonl"]
)
def test_command_lines_that_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("{}\n")
    assert cli.main(["run-batch", *words.split()]) == 2
    assert "error: " in capsys.readouterr().err
