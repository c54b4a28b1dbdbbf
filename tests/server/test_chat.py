"""POST /v1/chat/completions through the OpenAI client and a real socket."""

from __future__ import annotations

import openai
import pytest

from tests.server.conftest import Serve
from tests.server.fake_engine import MAX_MODEL_LEN, MODEL, FakeEngine

USER = [{"role": "user", "content": "Grüße, 世界 👋🏽"}]
REPLY = "user: Grüße, 世界 👋🏽\nassistant: "


def test_whole_reply(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=USER)
    assert reply.object == "chat.completion" and reply.model == MODEL and reply.id.startswith("chatcmpl-")
    (choice,) = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", REPLY)
    num_bytes = len(REPLY.encode())
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (num_bytes, num_bytes + 1)
    assert reply.usage.total_tokens == 2 * num_bytes + 1


def test_stream_adds_up_to_the_whole_reply(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=USER, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLY
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_usage_comes_last(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 16
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model=MODEL, messages=USER, stream=True, stream_options=options, n=2)
    assert all(chunk.usage is None for chunk in chunks) and last.choices == []
    whole = client.chat.completions.create(model=MODEL, messages=USER, n=2)
    assert last.usage == whole.usage
    assert whole.usage.prompt_tokens_details.cached_tokens == 16


def test_continuous_usage(client: openai.OpenAI) -> None:
    options = {"continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=USER, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == len(REPLY.encode()) + 1


def test_several_choices(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=USER, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=MODEL, messages=USER, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] == [REPLY, f"{REPLY}!1", f"{REPLY}!2"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(client: openai.OpenAI, stream: bool) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=USER, stop=["界 👋", "never"], stream=stream)
    if stream:
        chunks = list(reply)
        text, last = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0]
    else:
        last = reply.choices[0]
        text = last.message.content
    assert text == "user: Grüße, 世" and last.finish_reason == "stop" and last.stop_reason == "界 👋"


def test_logprobs(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=4)
    first, second, *_ = whole.choices[0].logprobs.content  # "u" (117, odd: the likeliest), "s" (115)
    assert (first.token, first.logprob, first.bytes) == ("u", -0.5, [117])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("u", -0.5), ("v", -1.5), ("w", -2.5), ("x", -9999.0)]
    assert second.token == "s"
    assert b"".join(bytes(entry.bytes) for entry in whole.choices[0].logprobs.content).decode() == REPLY
    streamed = []
    for chunk in client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=4, stream=True):
        streamed += chunk.choices[0].logprobs.content
    assert streamed == whole.choices[0].logprobs.content


def test_logprobs_without_rivals(client: openai.OpenAI, engine: FakeEngine) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=USER, logprobs=True)
    assert engine.submitted[0][1].logprobs == 0
    assert all(entry.top_logprobs == [] for entry in whole.choices[0].logprobs.content)


def test_unlikely_token_is_not_among_its_rivals(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "r"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
    entry = next(e for e in whole.choices[0].logprobs.content if e.token == "r")  # 114, even: ranks third
    assert entry.logprob == -2.5 and [top.token for top in entry.top_logprobs] == ["s", "t"]


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    penalties = {"presence_penalty": 0.1, "frequency_penalty": 0.2, "logit_bias": {"7": -100}}
    extra = penalties | {"repetition_penalty": 1.1, "bad_words": ["no"], "allowed_token_ids": [7, 8]}
    extra |= {"top_k": 7, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9], "skip_special_tokens": False}
    client.chat.completions.create(
        model=MODEL,
        messages=USER,
        temperature=0,
        top_p=0.5,
        seed=11,
        max_completion_tokens=5,
        max_tokens=9,
        stop="x",
        extra_body=extra,
    )
    params = engine.submitted[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.0, 0.5, 7, 0.1, 11)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
    assert params.logit_bias == {7: -100} and params.bad_words == ("no",) and list(params.allowed_token_ids or ()) == [7, 8]
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (5, 2, True)
    assert (params.stop, params.stop_token_ids, params.skip_special_tokens) == (("x",), (9,), False)


def test_model_defaults_and_room(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(model=MODEL, messages=USER, top_p=None)
    prompt, params = engine.submitted[0]
    assert (params.temperature, params.top_k) == (0.6, 20)
    assert params.max_tokens == MAX_MODEL_LEN - len(prompt)
    engine.default_sampling["max_tokens"] = 3
    client.chat.completions.create(model=MODEL, messages=USER)
    assert engine.submitted[1][1].max_tokens == 3


def test_messages_in_all_their_forms(client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "d"},
    ]
    reply = client.chat.completions.create(
        model=MODEL, messages=messages, user="me", metadata={"k": "v"}, frequency_penalty=0, tools=[]
    )
    assert reply.choices[0].message.content == "system: be brief\nuser: a\nb\nassistant: c\nuser: d\nassistant: "


def test_template_variables(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False}
    reply = client.chat.completions.create(model=MODEL, messages=USER, extra_body=extra)
    assert engine.tokenizer.template_kwargs == {"enable_thinking": False}
    assert not reply.choices[0].message.content.endswith("assistant: ")
    for name in ("messages", "think", "m["):
        with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
            client.chat.completions.create(model=MODEL, messages=USER, extra_body={"chat_template_kwargs": {name: True}})


def test_without_tokenizer(serve: Serve) -> None:
    url = serve(FakeEngine(tokenizer=False))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.chat.completions.create(model=MODEL, messages=USER)
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.completions.create(model=MODEL, prompt="text")
        reply = client.completions.create(model=MODEL, prompt=[104, 105], logprobs=1)
    (choice,) = reply.choices
    assert (choice.text, choice.token_ids) == ("", [104, 105, 256])
