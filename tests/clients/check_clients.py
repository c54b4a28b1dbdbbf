"""`make test-clients`: programs that people point at a server, each from a venv of its own, against SmolLM2 over a socket."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENGINE = ["smollm2", "--max-model-len", "1024", "--num-gpu-blocks-override", "512"]


def python(venv: str) -> Path:
    return ROOT / f".venv-{venv}" / "bin" / "python"


@contextlib.contextmanager
def running(command: list[str], ready: str, **env: str) -> Iterator[str]:
    """A program, once it has written a line with `ready`; gives what follows that."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | env
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if ready in line:
                yield line.partition(ready)[2].strip()
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(
        [sys.executable, "-m", "jaxserve", "serve", *ENGINE, "--port", "0", "--metrics-alias", "vllm"], "ready at "
    ) as url:
        yield url


def run(venv: str, *args: str, timeout_s: float = 300) -> str:
    env = os.environ | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python(venv), *args], check=False, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["litellm", "langchain"])
def test_openai_clients(url: str, name: str) -> None:
    assert run("clients", str(HERE / f"uses_{name}.py"), url).strip().endswith("passed")


def evaluate(url: str, tmp_path: Path, model: str, path: str, task: str, *flags: str, **model_args: str) -> dict[str, float]:
    options = {"model": "smollm2", "base_url": url + path, "max_length": "1024", "num_concurrent": "4", **model_args}
    text = ",".join(f"{name}={value}" for name, value in options.items())
    command = ["-m", "lm_eval", "--model", model, "--model_args", text, "--tasks", task, "--include_path", str(HERE / "tasks")]
    run("lmeval", *command, "--output_path", str(tmp_path), *flags)
    (found,) = tmp_path.rglob("results_*.json")
    scores = json.loads(found.read_text())["results"][task]
    return {name.partition(",")[0]: value for name, value in scores.items() if isinstance(value, int | float)}


def test_lm_eval_completions(url: str, tmp_path: Path) -> None:
    """loglikelihood: echo and logprobs of prompts that are token ids, and the server as the tokenizer."""
    scores = evaluate(url, tmp_path, "local-completions", "/v1/completions", "capitals", tokenizer_backend="remote")
    assert scores["acc"] >= 0.75, scores  # a model of 135 M parameters knows these; guessing gives 0.25


def test_lm_eval_chat(url: str, tmp_path: Path) -> None:
    path = "/v1/chat/completions"
    scores = evaluate(url, tmp_path, "local-chat-completions", path, "capitals_chat", "--apply_chat_template")
    assert scores["contains"] >= 0.5, scores


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_fastchat(tmp_path: Path) -> None:
    """The real controller and OpenAI front, and our worker; the front is asked by OpenAI's client."""
    ports = [free_port() for _ in range(3)]
    controller, front, worker = (f"http://127.0.0.1:{port}" for port in ports)
    ready, logs = "Uvicorn running on", {"LOGDIR": str(tmp_path)}
    own = [sys.executable, "-m", "jaxserve.server.fastchat_worker", *ENGINE, "--port", str(ports[2])]
    serve = [str(python("fastchat")), "-m"]
    with (
        running([*serve, "fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(ports[0])], ready, **logs),
        running([*own, "--controller-address", controller, "--model-names", "smollm2"], "ready at ") as address,
        running(
            [
                *serve,
                "fastchat.serve.openai_api_server",
                "--host",
                "127.0.0.1",
                "--port",
                str(ports[1]),
                "--controller-address",
                controller,
            ],
            ready,
            **logs,
        ),
    ):
        assert address == worker
        for _ in range(100):
            request = urllib.request.Request(f"{controller}/list_models", b"", method="POST")
            if json.load(urllib.request.urlopen(request))["models"] == ["smollm2"]:
                break
            time.sleep(0.1)
        import openai

        with openai.OpenAI(base_url=f"{front}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["smollm2"]
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            whole = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=24)
            chunks = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=24, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            text = client.completions.create(model="smollm2", prompt="The capital of France is", temperature=0, max_tokens=5)
    assert whole.choices[0].message.content and "Paris" in whole.choices[0].message.content
    assert streamed == whole.choices[0].message.content
    assert re.search("Paris", text.choices[0].text)
