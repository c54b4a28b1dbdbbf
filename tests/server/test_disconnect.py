"""A client that goes takes its requests with it, over a real socket."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server.conftest import wait_for
from tests.server.fake_engine import FakeEngine

BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "n": {"messages": [{"role": "user", "content": "hi"}], "n": 3},
    "completion": {"prompt": "hi"},
    "batch": {"prompt": ["hi", "ho", "hm"]},
}
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
each_mode = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def send(url: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request has been sent."""
    address = urlsplit(url)
    assert address.hostname and address.port
    sock = socket.create_connection((address.hostname, address.port), timeout=10)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    sock.sendall(head.encode() + content)
    return sock


@each_mode
@each_body
def test_client_goes_while_its_requests_wait(url: str, engine: FakeEngine, body: dict[str, Any], stream: bool) -> None:
    engine.hold = True
    num_requests = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    with send(url, body | {"stream": stream}):
        wait_for(lambda: len(engine.running) == num_requests)
    wait_for(lambda: not engine.running)
    assert len(engine.aborted) == num_requests


@each_mode
@each_body
def test_client_goes_in_mid_answer(url: str, engine: FakeEngine, body: dict[str, Any], stream: bool) -> None:
    engine.token_delay_s = 0.01
    engine.reply = lambda prompt, i: "x" * 300
    with send(url, body | {"stream": stream, "max_tokens": 300}) as sock:
        if stream:
            assert sock.recv(10_000).startswith(b"HTTP/1.1 200")
        wait_for(lambda: len(engine.submitted) > 0)
    wait_for(lambda: not engine.running)
    assert engine.aborted


def test_client_that_reads_no_more_is_cut_off_when_it_goes(url: str, engine: FakeEngine) -> None:
    """The server is blocked in a write then, not in a wait for the engine."""
    engine.reply = lambda prompt, i: "x" * 300
    body = {"prompt": ["p"] * 32, "n": 128, "max_tokens": 300, "stream": True}
    with send(url, body):
        wait_for(lambda: len(engine.submitted) == 32)
        time.sleep(0.5)  # both socket buffers are full by now
    wait_for(lambda: not engine.running)
    assert engine.aborted


@each_mode
def test_a_reply_that_was_read_to_its_end_is_not_aborted(url: str, engine: FakeEngine, stream: bool) -> None:
    with send(url, {"prompt": ["hi", "ho"], "stream": stream}) as sock:
        received = b""
        while not received.endswith((b"0\r\n\r\n", b"}")):
            received += sock.recv(10_000)
    wait_for(lambda: not engine.running)
    assert len(engine.submitted) == 2 and not engine.aborted
