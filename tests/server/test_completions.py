"""POST /v1/completions through the OpenAI client and a real socket."""

from __future__ import annotations

import openai
import pytest

from tests.server.fake_engine import MAX_MODEL_LEN, MODEL, FakeEngine

TEXT = "naïve ☕"
IDS = list(TEXT.encode())


@pytest.mark.parametrize("prompt", [TEXT, [TEXT], IDS, [IDS]], ids=["text", "texts", "ids", "lists of ids"])
def test_forms_of_a_prompt(client: openai.OpenAI, prompt: object) -> None:
    reply = client.completions.create(model=MODEL, prompt=prompt)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    assert [choice.text for choice in reply.choices] == [TEXT]
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(IDS), len(IDS) + 1)


@pytest.mark.parametrize("prompt", [["one", "a longer one", "3"], [[65, 66], [67], [68, 69, 70]]], ids=["texts", "ids"])
def test_batch_streams_what_it_gives_whole(client: openai.OpenAI, prompt: list[str]) -> None:
    whole = client.completions.create(model=MODEL, prompt=prompt, n=2)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts, reasons = [""] * 6, [None] * 6
    options = {"include_usage": True}
    *chunks, last = client.completions.create(model=MODEL, prompt=prompt, n=2, stream=True, stream_options=options)
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert last.usage == whole.usage


def test_sixteen_tokens_if_not_told(client: openai.OpenAI, engine: FakeEngine) -> None:
    reply = client.completions.create(model=MODEL, prompt="x" * 40)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("x" * 16, "length")
    client.completions.create(model=MODEL, prompt="x" * (MAX_MODEL_LEN - 4))
    assert engine.submitted[-1][1].max_tokens == 4


def test_logprobs(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="abc", logprobs=2).choices[0].logprobs
    assert whole.tokens == ["a", "b", "c", "<eos>"]
    assert whole.token_logprobs == [-0.5, -2.5, -0.5, -2.5]
    assert whole.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    assert whole.top_logprobs[1] == {"c": -0.5, "d": -1.5, "b": -2.5}  # the likeliest two, and the token that is there
    assert whole.text_offset == [0, 1, 2, 3]


def test_streamed_logprobs_add_up(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=["abc", TEXT], logprobs=3)
    parts = [{"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in whole.choices]
    for chunk in client.completions.create(model=MODEL, prompt=["abc", TEXT], logprobs=3, stream=True):
        for name, values in parts[chunk.choices[0].index].items():
            values += getattr(chunk.choices[0].logprobs, name)
    assert parts == [choice.logprobs.to_dict() for choice in whole.choices]


@pytest.mark.parametrize("prompt", [["abc", "abc"], [97, 98, 99]], ids=["texts", "ids"])
def test_echo(client: openai.OpenAI, prompt: object) -> None:
    whole = client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=1, n=2)
    for i, choice in enumerate(whole.choices):
        assert choice.text == "abcabc" + "!1" * (i % 2)
        logprobs = choice.logprobs
        assert logprobs.tokens[:4] == ["a", "b", "c", "a"]
        assert logprobs.token_logprobs[:4] == [None, -2.5, -0.5, -0.5]
        assert logprobs.top_logprobs[:2] == [None, {"c": -0.5, "b": -2.5}]
        assert logprobs.text_offset == list(range(7 + 2 * (i % 2)))
    assert whole.usage.completion_tokens == sum(len(choice.text) - 3 + 1 for choice in whole.choices)


def test_streamed_echo_adds_up(client: openai.OpenAI, engine: FakeEngine) -> None:
    text, tokens = "", []
    for chunk in client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=1, stream=True):
        text += chunk.choices[0].text
        tokens += chunk.choices[0].logprobs.tokens
    assert text == "abcabc" and tokens == [*"abcabc", "<eos>"]
    chunks = client.completions.create(model=MODEL, prompt="abc", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcabc"
    assert engine.submitted[1][1].prompt_logprobs is None


def test_best_of_reaches_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model=MODEL, prompt="abc", n=2, best_of=3)
    assert (engine.submitted[0][1].n, engine.submitted[0][1].best_of) == (2, 3)


def test_priority_reaches_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model=MODEL, prompt=["a", "b"], extra_body={"priority": -3})
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}], extra_body={"priority": 7})
    client.completions.create(model=MODEL, prompt="a")
    assert [options["priority"] for options in engine.options] == [-3, -3, 7, 0]


def test_token_ids_on_request(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    assert client.completions.create(model=MODEL, prompt="hi", extra_body=extra).choices[0].token_ids == [104, 105, 256]
    chunks = list(client.completions.create(model=MODEL, prompt="hi", extra_body=extra, stream=True))
    assert [token_id for chunk in chunks for token_id in chunk.choices[0].token_ids] == [104, 105, 256]


def test_line_separators_survive_the_stream(client: openai.OpenAI) -> None:
    text = "a\u2028b\x85c\r\nd\n\ne"
    chunks = client.completions.create(model=MODEL, prompt=text, max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
