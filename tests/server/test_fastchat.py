"""The FastChat worker, and its registration. With the real fschat: tests/clients."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from jaxserve.server.config import ServerConfig
from jaxserve.server.fastchat.controller import Registration
from jaxserve.server.fastchat.conversation import read_messages, template
from jaxserve.server.fastchat.worker import Worker, create_worker
from jaxserve.server.run import Server, bind
from tests.server.conftest import wait_for
from tests.server.fake_engine import MAX_MODEL_LEN, FakeEngine


def fill(messages: list[tuple[str, str | None]], system: str = "") -> str:
    """As fastchat.conversation writes its style CHATML."""
    conv = template()
    system_text = conv["system_template"].format(system_message=system)
    roles = dict(zip(("user", "assistant"), conv["roles"], strict=True))
    parts = [f"{roles[role]}\n" + (f"{text}{conv['sep']}\n" if text is not None else "") for role, text in messages]
    return system_text + conv["sep"] + "\n" + "".join(parts)


@pytest.mark.parametrize("system", ["", "be brief"])
def test_messages_come_through(system: str) -> None:
    prompt = fill([("user", "a\nb"), ("assistant", "c "), ("user", ""), ("assistant", None)], system)
    first = [{"role": "system", "content": system}] if system else []
    rest = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c "}, {"role": "user", "content": ""}]
    assert read_messages(prompt) == first + rest


@pytest.mark.parametrize("prompt", ["", "hello", "x" + fill([("user", "a")]), fill([("user", "a")]).replace(":user", ":root")])
def test_raw_prompts(prompt: str) -> None:
    assert read_messages(prompt) is None


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def worker(engine: FakeEngine) -> Iterator[httpx.Client]:
    config, ready = ServerConfig(port=0, shutdown_timeout=1), threading.Event()
    with bind(config) as sock:
        server = Server(create_worker(engine, Worker(engine, ["a", "b"]), config), sock, config, lambda _: ready.set())
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        try:
            assert ready.wait(20)
            with httpx.Client(base_url=server.url, timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(20)


def values(client: httpx.Client, **params: Any) -> list[dict[str, Any]]:
    text = client.post("/worker_generate_stream", json=params).text
    assert text.endswith("\0")
    return [json.loads(part) for part in text.split("\0")[:-1]]


def test_stream(worker: httpx.Client, engine: FakeEngine) -> None:
    got = values(worker, model="a", prompt="Grüße", temperature=0.5, max_new_tokens=100, echo=False, stop=None, logprobs=None)
    texts = [value["text"] for value in got]
    assert texts == sorted(texts, key=len) and texts[-1] == "Grüße"
    assert [value["finish_reason"] for value in got] == [None] * (len(got) - 1) + ["stop"]
    assert got[-1]["usage"]["completion_tokens"] == 8 and got[-1]["error_code"] == 0
    assert engine.submitted[0][1].temperature == 0.5
    assert values(worker, prompt="ab")[-1]["text"] == "abab"  # with echo


def test_chat(worker: httpx.Client) -> None:
    prompt = fill([("user", "hi"), ("assistant", None)], "be brief")
    whole = worker.post("/worker_generate", json={"prompt": prompt, "echo": False}).json()
    assert whole["text"] == "system: be brief\nuser: hi\nassistant: " and whole["finish_reason"] == "stop"
    count = worker.post("/count_token", json={"prompt": prompt}).json()["count"]
    assert count == len(whole["text"]) == whole["usage"]["prompt_tokens"]


def test_facts(worker: httpx.Client) -> None:
    assert worker.post("/worker_get_status").json() == {"model_names": ["a", "b"], "speed": 1, "queue_length": 0}
    assert worker.post("/model_details").json() == {"context_length": MAX_MODEL_LEN}
    assert worker.post("/worker_get_conv_template").json() == {"conv": template()}
    assert worker.post("/count_token", json={"prompt": "abc"}).json() == {"count": 3, "error_code": 0}


def test_errors_are_values(worker: httpx.Client, engine: FakeEngine) -> None:
    assert values(worker, prompt="x" * MAX_MODEL_LEN)[0]["error_code"] == 40303
    assert values(worker, prompt="x", presence_penalty=9)[0]["error_code"] == 40302
    engine.crash_after = 2
    (*_, last) = values(worker, prompt="abc")
    assert last["error_code"] == 50001 and "secret" not in last["text"]
    engine.reset()
    engine.queue_limit = 0
    assert values(worker, prompt="x")[0]["error_code"] == 42903


def test_a_client_that_goes(worker: httpx.Client, engine: FakeEngine) -> None:
    engine.hold = True
    with pytest.raises(httpx.ReadTimeout):
        worker.post("/worker_generate", json={"prompt": "a"}, timeout=0.5)
    wait_for(lambda: not engine.running)
    assert worker.post("/worker_get_status").json()["queue_length"] == 0


def test_registration() -> None:
    """It registers, beats, and registers again when it is forgotten or the controller has been away."""
    seen: list[tuple[str, dict[str, Any]]] = []
    answers = iter([200, 200, 200, 200, 500, 200])

    class Controller(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            beats = sum(path == "/receive_heart_beat" for path, _ in seen)
            body = json.dumps({"exist": beats != 2} if self.path == "/receive_heart_beat" else None).encode()
            self.send_response(next(answers, 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Controller) as server:
        threading.Thread(target=server.serve_forever).start()
        status = {"model_names": ["a"], "speed": 1, "queue_length": 3}
        registration = Registration(f"http://127.0.0.1:{server.server_port}/", "http://w", lambda: status, beat_s=0.05)
        registration.start()
        try:
            wait_for(lambda: len(seen) >= 9)
        finally:
            registration.stop()
            server.shutdown()
    paths = [path for path, _ in seen]
    assert paths[:4] == ["/register_worker", "/receive_heart_beat", "/receive_heart_beat", "/register_worker"]
    assert paths.count("/register_worker") >= 3
    assert seen[0][1] == {"worker_name": "http://w", "check_heart_beat": True, "multimodal": False, "worker_status": status}
    assert seen[1][1] == {"worker_name": "http://w", "queue_length": 3}
