"""What is refused, and how: OpenAI's error body with the status that its clients know."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from jaxserve.errors import ConfigError, EngineDeadError, InvalidRequestError, PromptTooLongError, QueueFullError, RequestError
from jaxserve.server.errors import describe
from tests.server.conftest import Serve, wait_for
from tests.server.fake_engine import MAX_MODEL_LEN, MODEL, FakeEngine

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"prompt": "hi"}


def post(http: httpx.Client, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = http.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)
    return response.status_code, response.json()["error"]


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        (CHAT | {"tools": [{"type": "function"}]}, "tools", "not supported"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (CHAT | {"frequency_penalty": 2.5}, "frequency_penalty", "between -2 and 2"),
        (CHAT | {"logit_bias": {"five": 1}}, "logit_bias", "must map token ids"),
        (CHAT | {"logit_bias": {"5": 101}}, "logit_bias", "must map token ids"),
        (CHAT | {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024 of them at most"),
        (CHAT | {"bad_words": [""]}, "bad_words", "non-empty"),
        (CHAT | {"allowed_token_ids": []}, "allowed_token_ids", "not empty"),
        (CHAT | {"echo": True}, "echo", "not supported"),
        (CHAT | {"best_of": 2}, "best_of", "not supported"),
        (TEXT | {"suffix": "b"}, "suffix", "not supported"),
        (TEXT | {"n": 3, "best_of": 2}, "best_of", "at least n"),
        (TEXT | {"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        (TEXT | {"tempreture": 1}, "tempreture", "Did you mean 'temperature'"),
        (CHAT | {"temperature": "hot"}, "temperature", "must be a valid number; got 'hot'"),
        (CHAT | {"temperature": True}, "temperature", "must be a valid number"),
        (CHAT | {"temperature": -1}, "temperature", "0 or more"),
        (CHAT | {"top_p": 0}, "top_p", "above 0"),
        (CHAT | {"n": 0}, "n", "greater than or equal to 1"),
        (CHAT | {"n": 10**6}, "n", "less than or equal to 128"),
        (CHAT | {"max_tokens": 0}, "max_tokens", "at least 1"),
        (CHAT | {"seed": 2**70}, "seed", "64-bit"),
        (CHAT | {"priority": 1.5}, "priority", "valid integer"),
        (CHAT | {"stop": ["a"] * 65}, "stop", "at most 64"),
        (CHAT | {"stop": ""}, "stop", "non-empty"),
        (CHAT | {"stop": ["a", "b" * 1025]}, "stop[1]", "at most 1024"),
        (TEXT | {"bad_words": ["b" * 1025]}, "bad_words[0]", "at most 1024"),
        (CHAT | {"min_tokens": 9, "max_tokens": 3}, "min_tokens", "at most max_tokens"),
        (CHAT | {"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        (TEXT | {"logprobs": -1}, "logprobs", "greater than or equal to 0"),
        (CHAT | {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        (CHAT | {"stream": True, "stream_options": {"other": True}}, "stream_options.other", "not supported"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "'image_url' is not supported",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls", "not supported"),
        ({"messages": [{"role": "user", "content": "no template"}]}, "messages", "no chat template"),
        ({}, "prompt", "is required"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": ["a", 5]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
        ({"prompt": ""}, "prompt", "empty"),
    ],
)
def test_bad_request(http: httpx.Client, engine: FakeEngine, body: dict[str, Any], param: str, text: str) -> None:
    status, error = post(http, body)
    assert (status, error["param"], error["type"], error["code"]) == (400, param, "invalid_request_error", None)
    assert text in error["message"]
    assert not engine.running


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": "a", "\\ud800": 1}',
     b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}', b'{"model": "\\udfff", "prompt": "a"}',
     b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}"],
)  # fmt: skip
def test_malformed_body(http: httpx.Client, engine: FakeEngine, content: bytes) -> None:
    response = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not engine.submitted


def test_body_without_content_type(http: httpx.Client) -> None:
    response = http.post("/v1/completions", content=b'{"prompt": "a"}')
    assert response.status_code == 400 and "Content-Type" in response.json()["error"]["message"]


def test_body_over_the_limit(serve: Serve, engine: FakeEngine) -> None:
    url = serve(engine, max_body_bytes=1000)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a" * 1000}).status_code == 413
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_model(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-none", messages=CHAT["messages"], stream=stream)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert MODEL in caught.value.message and not engine.submitted


def test_model_may_be_left_out(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=TEXT).json()["model"] == MODEL


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_too_long(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * MAX_MODEL_LEN, stream=stream)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match=f"Lower max_tokens to {MAX_MODEL_LEN - 10}") as caught:
        client.completions.create(model=MODEL, prompt="x" * 10, max_tokens=MAX_MODEL_LEN - 9, stream=stream)
    assert caught.value.param == "max_tokens"
    client.completions.create(model=MODEL, prompt="x" * 10, max_tokens=MAX_MODEL_LEN - 10)
    assert len(engine.submitted) == 1


def test_full_queue_takes_the_whole_batch_or_nothing(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue_limit = 3
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=MODEL, prompt=["a", "b", "c", "d"])
    assert caught.value.code == "queue_full" and caught.value.response.headers["Retry-After"] == "1"
    assert not engine.running and len(engine.aborted) == 3


def test_dead_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.is_healthy = False
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=CHAT["messages"], stream=True)
    assert caught.value.status_code == 503 and caught.value.code == "engine_dead"


@pytest.mark.parametrize("prompt", ["abcdef", ["abcdef", "ghi"]], ids=["one", "batch"])
def test_error_in_mid_stream_is_an_event(client: openai.OpenAI, engine: FakeEngine, prompt: str) -> None:
    engine.fail_after = 3
    stream = client.completions.create(model=MODEL, prompt=prompt, stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match="the step failed twice"):
        texts.extend(chunk.choices[0].text for chunk in stream)
    assert "".join(texts).startswith("a")
    wait_for(lambda: not engine.running)


def test_failed_request_that_is_not_streamed(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_after = 3
    with pytest.raises(openai.InternalServerError, match="the step failed twice"):
        client.completions.create(model=MODEL, prompt=["abc", "d"])
    wait_for(lambda: not engine.running)


@pytest.mark.parametrize("stream", [False, True])
def test_unforeseen_error_keeps_its_text_to_itself(http: httpx.Client, engine: FakeEngine, stream: bool) -> None:
    engine.crash_after = 2
    response = http.post("/v1/completions", json=TEXT | {"stream": stream})
    assert "internal error" in response.text and "secret" not in response.text
    if stream:
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert json.loads(events[-2])["error"]["type"] == "server_error" and events[-1] == "[DONE]"
    else:
        assert response.status_code == 500
    wait_for(lambda: not engine.running)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("GET", "/docs", 404)]
)
def test_wrong_route(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status and path in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("m", param="p"), 400),
        (PromptTooLongError("m", param="p"), 400),
        (QueueFullError("m", param="p"), 429),
        (RequestError("m", param="p"), 500),
        (EngineDeadError("m"), 503),
        (ConfigError("m"), 500),
    ],
)
def test_every_error_has_a_status(error: Exception, status: int) -> None:
    got, body = describe(error)
    assert got == status and body["error"]["message"] == "m"
    assert body["error"]["param"] == getattr(error, "param", None)
