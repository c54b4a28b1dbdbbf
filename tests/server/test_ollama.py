"""Ollama's API through its client and a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from tests.server.conftest import wait_for
from tests.server.fake_engine import MODEL, FakeEngine

USER: list[Any] = [{"role": "user", "content": "Grüße 👋"}]
REPLY = "user: Grüße 👋\nassistant: "


@pytest.fixture
def client(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=url, timeout=20) as client:
        yield client


def test_chat(client: ollama.Client) -> None:
    whole = client.chat(model=MODEL, messages=USER)
    assert (whole.message.role, whole.message.content, whole.done, whole.done_reason) == ("assistant", REPLY, True, "stop")
    num_bytes = len(REPLY.encode())
    assert (whole.prompt_eval_count, whole.eval_count) == (num_bytes, num_bytes + 1) and whole.total_duration > 0
    *parts, last = client.chat(model=f"{MODEL}:latest", messages=USER, stream=True)
    assert not any(part.done for part in parts) and last.done
    assert "".join(part.message.content for part in [*parts, last]) == REPLY
    assert last.eval_duration + last.prompt_eval_duration == last.total_duration


def test_generate(client: ollama.Client, engine: FakeEngine) -> None:
    assert client.generate(model=MODEL, prompt="hi", system="be brief").response == "system: be brief\nuser: hi\nassistant: "
    assert client.generate(model=MODEL, prompt="a long prompt of more than 16 bytes", raw=True).done_reason == "stop"
    assert "".join(part.response for part in client.generate(model=MODEL, prompt="hi", raw=True, stream=True)) == "hi"
    assert [options["continues_text"] for options in engine.options] == [False, True, True]


def test_options_reach_the_engine(client: ollama.Client, engine: FakeEngine) -> None:
    options = {"num_predict": 4, "temperature": 0.3, "top_k": 5, "seed": 7, "stop": ["x"], "repeat_penalty": 1.2, "num_ctx": 100}
    whole = client.chat(model=MODEL, messages=USER, options=options, keep_alive="5m")
    assert (whole.message.content, whole.done_reason) == ("user", "length")
    params = engine.submitted[0][1]
    assert (params.max_tokens, params.temperature, params.top_k, params.seed) == (4, 0.3, 5, 7)
    assert (params.stop, params.repetition_penalty) == (("x",), 1.2)


def test_models(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == [MODEL]
    assert [model.model for model in client.ps().models] == [MODEL]
    shown = client.show(MODEL)
    assert shown.capabilities == ["completion"] and shown.modelinfo["jaxserve.context_length"] == 400


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"format": "json"}, "'format' is not supported"),
        ({"options": {"mirostat": 2}}, "'mirostat' is not supported"),
        ({"options": {"num_ctx": 10**6}}, "num_ctx"),
        ({"think": True}, "think"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "'images' is not supported"),
    ],
)
def test_bad_request(http: httpx.Client, fields: dict[str, Any], text: str) -> None:
    response = http.post("/api/chat", json={"model": MODEL, "messages": USER} | fields)
    assert response.status_code == 400 and text in response.json()["error"]


def test_unknown_model(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as caught:
        client.chat(model="other", messages=USER)
    assert caught.value.status_code == 404


def test_error_in_mid_stream(client: ollama.Client, engine: FakeEngine) -> None:
    engine.fail_after = 3
    with pytest.raises(ollama.ResponseError, match="the step failed twice"):
        list(client.chat(model=MODEL, messages=USER, stream=True))
    wait_for(lambda: not engine.running)


def test_a_body_without_a_type(http: httpx.Client, engine: FakeEngine) -> None:
    """From a program, as litellm sends it; not from a web page."""
    body = b'{"model": "org/fake-model", "prompt": "hi", "stream": false}'
    assert http.post("/api/generate", content=body).status_code == 200
    assert http.post("/api/generate", content=body, headers={"Origin": "https://evil.example"}).status_code == 400
    assert http.post("/api/generate", content=body, headers={"Content-Type": "text/plain"}).status_code == 400
    assert len(engine.submitted) == 1
