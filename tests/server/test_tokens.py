"""/tokenize, /detokenize and /tokenizer_info; prompt logprobs and token ids in replies; salts."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Serve
from tests.server.fake_engine import MAX_MODEL_LEN, MODEL, FakeEngine

USER: list[Any] = [{"role": "user", "content": "hi"}]
CHAT_IDS = list(b"user: hi\nassistant: ")


def test_tokenize(http: httpx.Client) -> None:
    reply = http.post("/tokenize", json={"model": MODEL, "prompt": "héé", "return_token_strs": True}).json()
    assert reply["tokens"] == list("héé".encode()) and reply["count"] == 5 and reply["max_model_len"] == MAX_MODEL_LEN
    assert reply["token_strs"][0] == "h"
    assert http.post("/tokenize", json={"messages": USER}).json()["tokens"] == CHAT_IDS
    bare = http.post("/tokenize", json={"messages": USER, "add_generation_prompt": False}).json()
    assert bytes(bare["tokens"]) == b"user: hi\n"


def test_detokenize(http: httpx.Client) -> None:
    assert http.post("/detokenize", json={"tokens": list("héé".encode())}).json() == {"prompt": "héé"}
    response = http.post("/detokenize", json={"tokens": [5, 300]})
    assert response.status_code == 400 and "tokens[1]" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": USER}, {"model": "other", "prompt": "a"}])
def test_bad_requests(http: httpx.Client, body: dict[str, Any]) -> None:
    assert http.post("/tokenize", json=body).status_code in (400, 404)


def test_tokenizer_info(http: httpx.Client) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<eos>" and "messages" in info["chat_template"]


def test_without_tokenizer(serve: Serve) -> None:
    url = serve(FakeEngine(tokenizer=False))
    for method, path, body in [
        ("POST", "/tokenize", {"prompt": "a"}), ("POST", "/detokenize", {"tokens": [1]}), ("GET", "/tokenizer_info", None),
    ]:  # fmt: skip
        response = httpx.request(method, url + path, json=body)
        assert response.status_code == 400 and "no tokenizer" in response.json()["error"]["message"]


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(http: httpx.Client, engine: FakeEngine) -> None:
    encode = engine.tokenizer.encode
    engine.tokenizer.encode = lambda *args, **kwargs: pytest.fail("encoded")
    try:
        long = "x" * (MAX_MODEL_LEN + 1)
        for path, body in [
            ("/v1/completions", {"prompt": long}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
            ("/v1/responses", {"input": long}),
            ("/tokenize", {"prompt": long}),
        ]:
            response = http.post(path, json=body)
            assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    finally:
        engine.tokenizer.encode = encode


def test_prompt_logprobs(http: httpx.Client) -> None:
    reply = http.post("/v1/chat/completions", json={"messages": USER, "prompt_logprobs": 1, "max_tokens": 1}).json()
    positions = reply["prompt_logprobs"]
    assert len(positions) == len(CHAT_IDS) and positions[0] is None
    assert positions[1] == {"115": {"logprob": -0.5, "rank": 1, "decoded_token": "s"}}
    assert set(positions[3]) == {"114", "115"} and positions[3]["114"]["rank"] == 3  # "r", which came third
    choice = http.post("/v1/completions", json={"prompt": "us", "prompt_logprobs": 0, "max_tokens": 1}).json()["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"115": {"logprob": -0.5, "rank": 1, "decoded_token": "s"}}]
    refused = http.post("/v1/completions", json={"prompt": "us", "prompt_logprobs": 0, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"


def test_echo_and_prompt_logprobs_keep_their_own_numbers(http: httpx.Client) -> None:
    body = {"prompt": "us", "echo": True, "logprobs": 1, "prompt_logprobs": 3, "max_tokens": 1}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert [len(top or {}) for top in choice["logprobs"]["top_logprobs"]] == [0, 1, 1]
    assert len(choice["prompt_logprobs"][1]) == 3


def test_prompt_token_ids(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    whole = client.chat.completions.create(model=MODEL, messages=USER, extra_body=extra, max_tokens=2)
    assert whole.prompt_token_ids == CHAT_IDS and whole.choices[0].token_ids == CHAT_IDS[:2]
    first, second = client.chat.completions.create(model=MODEL, messages=USER, extra_body=extra, max_tokens=2, stream=True)
    assert first.prompt_token_ids == CHAT_IDS and not hasattr(second, "prompt_token_ids")
    texts = client.completions.create(model=MODEL, prompt=["ab", "c"], extra_body=extra)
    assert [choice.prompt_token_ids for choice in texts.choices] == [[97, 98], [99]]


def test_going_on_with_the_last_message(client: openai.OpenAI, engine: FakeEngine) -> None:
    messages = [*USER, {"role": "assistant", "content": "The"}]
    extra = {"continue_final_message": True}
    client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra)
    assert bytes(engine.submitted[0][0]) == b"user: hi\nassistant: The"
    client.chat.completions.create(model=MODEL, messages=USER)
    assert [options["continues_text"] for options in engine.options] == [True, False]
    with pytest.raises(openai.BadRequestError, match="choose"):
        client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra | {"add_generation_prompt": True})


def test_cache_salt(client: openai.OpenAI, engine: FakeEngine) -> None:
    for salt in (None, "a", "a", "b"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"cache_salt": salt})
    salts = [options["cache_salt"] for options in engine.options]
    assert salts[0] == "" and salts[1] == salts[2] and len(set(salts)) == 3


def test_ping_and_load(http: httpx.Client, engine: FakeEngine) -> None:
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert http.get("/load").json()["server_load"] == 0
    engine.is_healthy = False
    assert http.get("/ping").status_code == 503
