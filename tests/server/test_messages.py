"""/v1/messages through Anthropic's client and a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.server.conftest import wait_for
from tests.server.fake_engine import MAX_MODEL_LEN, MODEL, FakeEngine

USER: list[Any] = [{"role": "user", "content": "Grüße 👋"}]
REPLY = "user: Grüße 👋\nassistant: "


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_whole_message(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 4
    message = client.messages.create(model=MODEL, max_tokens=100, messages=USER)
    assert (message.type, message.role, message.model, message.stop_reason) == ("message", "assistant", MODEL, "end_turn")
    assert [block.text for block in message.content] == [REPLY]
    num_bytes = len(REPLY.encode())
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (num_bytes - 4, 4, num_bytes + 1)


def test_stream_adds_up_to_the_whole_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=100, messages=USER) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == REPLY and last.content[0].text == REPLY and last.stop_reason == "end_turn"
    assert last.usage.output_tokens == len(REPLY.encode()) + 1


def test_order_of_events(http: httpx.Client) -> None:
    body = {"model": MODEL, "max_tokens": 2, "messages": USER, "stream": True}
    names = [line.removeprefix("event: ") for line in http.post("/v1/messages", json=body).text.splitlines() if "event: " in line]
    around = ["message_start", "content_block_start", "ping", "content_block_stop", "message_delta", "message_stop"]
    assert [name for name in names if name != "content_block_delta"] == around


def test_system_and_parts(client: anthropic.Anthropic) -> None:
    system: list[Any] = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    message = client.messages.create(model=MODEL, max_tokens=100, messages=messages, system=system, metadata={"user_id": "me"})
    assert message.content[0].text == "system: be brief\nuser: a\nb\nassistant: "


def test_assistant_words_are_gone_on_with(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    client.messages.create(model=MODEL, max_tokens=5, messages=[*USER, {"role": "assistant", "content": "The"}])
    assert engine.tokenizer.template_kwargs == {"continue_final_message": True}
    assert engine.options[0]["continues_text"] is True


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [({"max_tokens": 3}, "max_tokens", None), ({"max_tokens": 90, "stop_sequences": ["ass"]}, "stop_sequence", "ass")],
)
def test_stop_reasons(client: anthropic.Anthropic, fields: dict[str, Any], reason: str, sequence: str | None) -> None:
    message = client.messages.create(model=MODEL, messages=USER, **fields)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_sampling_fields_reach_the_engine(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    client.messages.create(model=MODEL, max_tokens=7, messages=USER, extra_body={"temperature": 0.3, "top_k": 5, "top_p": 0.9})
    params = engine.submitted[0][1]
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (7, 0.3, 5, 0.9)


def test_count_tokens(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model=MODEL, messages=USER).input_tokens == len(REPLY.encode())


def test_errors_have_anthropics_form(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="other", max_tokens=5, messages=USER)
    assert missing.value.body["type"] == "error" and missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        client.messages.create(
            model=MODEL, max_tokens=5, messages=USER, tools=[{"name": "f", "input_schema": {"type": "object"}}]
        )
    with pytest.raises(anthropic.BadRequestError, match="Lower max_tokens"):
        client.messages.create(model=MODEL, max_tokens=MAX_MODEL_LEN, messages=USER)
    engine.queue_limit = 0
    with pytest.raises(anthropic.RateLimitError) as full:
        client.messages.create(model=MODEL, max_tokens=5, messages=USER)
    assert full.value.response.headers["Retry-After"] == "1"


def test_error_in_mid_stream(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.fail_after = 3
    with (
        pytest.raises(anthropic.APIStatusError, match="the step failed twice"),
        client.messages.stream(model=MODEL, max_tokens=50, messages=USER) as stream,
    ):
        list(stream.text_stream)
    wait_for(lambda: not engine.running)
