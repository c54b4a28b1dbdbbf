"""/v1/responses through the OpenAI client and a real socket."""

from __future__ import annotations

import httpx
import openai
import pytest

from jaxserve.server.responses.store import ResponseStore, StoredResponse
from tests.server.conftest import Serve, wait_for
from tests.server.fake_engine import MODEL, FakeEngine


def test_whole_response(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 3
    response = client.responses.create(model=MODEL, input="Grüße 👋", instructions="be brief", temperature=0.5)
    text = "system: be brief\nuser: Grüße 👋\nassistant: "
    assert (response.output_text, response.status, response.error, response.temperature) == (text, "completed", None, 0.5)
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    num_bytes = len(text.encode())
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (num_bytes, num_bytes + 1, 2 * num_bytes + 1)
    assert usage.input_tokens_details.cached_tokens == 3


def test_stream_adds_up_to_the_whole_response(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="Grüße 👋", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        f"response.{kind}"
        for kind in ("created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
                     "content_part.done", "output_item.done", "completed")
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1].response
    assert text == last.output_text == client.responses.create(model=MODEL, input="Grüße 👋").output_text
    assert client.responses.retrieve(last.id).output_text == text


def test_the_openai_client_can_gather_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hello") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "user: hello\nassistant: "


def test_cut_by_the_limit(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="hello", max_output_tokens=4)
    assert (response.status, response.incomplete_details.reason, response.output_text) == (
        "incomplete",
        "max_output_tokens",
        "user",
    )
    *_, last = client.responses.create(model=MODEL, input="hello", max_output_tokens=4, stream=True)
    assert last.type == "response.incomplete" and last.response.output_text == "user"


def test_items_as_input(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="a")
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        *[item.to_dict() for item in first.output],
        {"type": "message", "role": "user", "content": "b"},
    ]
    response = client.responses.create(model=MODEL, input=items)
    assert response.output_text == "user: a\nassistant: user: a\nassistant: \nuser: b\nassistant: "


def test_a_response_goes_on_with_another(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="a", instructions="x")
    second = client.responses.create(model=MODEL, input="b", previous_response_id=first.id)
    assert second.output_text == f"user: a\nassistant: {first.output_text}\nuser: b\nassistant: "
    assert second.previous_response_id == first.id


def test_stored_or_not(client: openai.OpenAI) -> None:
    kept = client.responses.create(model=MODEL, input="a")
    assert client.responses.retrieve(kept.id) == kept
    client.responses.delete(kept.id)
    loose = client.responses.create(model=MODEL, input="a", store=False)
    for name in (kept.id, loose.id, "resp_none"):
        with pytest.raises(openai.NotFoundError, match="no such response"):
            client.responses.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input="a", previous_response_id=loose.id)


def test_background(client: openai.OpenAI, engine: FakeEngine) -> None:
    response = client.responses.create(model=MODEL, input="a", background=True)
    assert response.status == "in_progress"
    wait_for(lambda: client.responses.retrieve(response.id).status == "completed")
    assert client.responses.retrieve(response.id).output_text == "user: a\nassistant: "
    engine.hold = True
    response = client.responses.create(model=MODEL, input="a", background=True)
    assert client.responses.cancel(response.id).status == "cancelled"
    wait_for(lambda: not engine.running)
    assert client.responses.retrieve(response.id).status == "cancelled"


def test_background_that_fails(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.crash_after = 2
    response = client.responses.create(model=MODEL, input="a", background=True)
    wait_for(lambda: client.responses.retrieve(response.id).status == "failed")
    assert "secret" not in client.responses.retrieve(response.id).error.message


def test_error_in_mid_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_after = 3
    *_, last = client.responses.create(model=MODEL, input="a", stream=True)
    assert last.type == "response.failed" and "the step failed twice" in last.response.error.message
    wait_for(lambda: not engine.running)


def test_logprobs(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="u", top_logprobs=2, include=["message.output_text.logprobs"])
    first = response.output[0].content[0].logprobs[0]
    assert (first.token, first.logprob, [top.token for top in first.top_logprobs]) == ("u", -0.5, ["u", "v"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": []}, "input"),
        ({"input": "a", "background": True, "stream": True}, "background"),
        ({"input": "a", "reasoning": {"effort": "high"}}, "reasoning"),
        ({}, "input"),
    ],
)
def test_bad_request(http: httpx.Client, fields: dict[str, object], param: str) -> None:
    response = http.post("/v1/responses", json={"model": MODEL, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_the_oldest_are_forgotten(serve: Serve) -> None:
    url = serve(FakeEngine(), max_stored_responses=2)
    names = [httpx.post(f"{url}/v1/responses", json={"input": text}).json()["id"] for text in "abc"]
    assert [httpx.get(f"{url}/v1/responses/{name}").status_code for name in names] == [404, 200, 200]


def test_store_is_bounded_by_its_texts() -> None:
    store = ResponseStore(max_responses=10, max_characters=10)
    for name in "ab":
        store.put(StoredResponse("", {"id": name}, [{"role": "user", "content": "123456"}]))
    assert store.get("a", "") is None and store.get("b", "") is not None and store.get("b", "other") is None
