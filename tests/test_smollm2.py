"""A real model end to end: SmolLM2's greedy text is Hugging Face's, through LLM and through HTTP, together and alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ollama
import pytest
from anthropic import Anthropic
from openai import OpenAI

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.async_engine import AsyncEngine
from jaxserve.server.config import ServerConfig
from tests.server.conftest import served
from tests.smollm2_cases import CASES, NEAR_TIE, REFERENCE, assert_reference

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"max_model_len": 1024, "num_gpu_blocks_override": 512, "max_num_batched_tokens": 128}
GREEDY = SamplingParams(temperature=0, max_tokens=REFERENCE["max_tokens"])


@pytest.fixture(autouse=True, scope="module")
def quick_compiles() -> None:
    """Programs run for longer than they compile here."""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", **OPTIONS) as llm:
        yield llm
        llm.engine.check_integrity()
        assert llm.engine.scheduler.pool.num_held == 0


def generate(llm: LLM, cases: list[dict[str, Any]]) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": c["prompt_ids"]} for c in cases], GREEDY, use_tqdm=False)


def test_all_together(llm: LLM) -> None:
    for case, output in zip(CASES, generate(llm, CASES), strict=True):
        assert_reference(case, output.outputs[0].token_ids)
        if output.outputs[0].token_ids == case["ids"]:
            assert output.outputs[0].text == case["text"]


@pytest.mark.parametrize("index", [0, 5, 9])
def test_alone(llm: LLM, index: int) -> None:
    assert_reference(CASES[index], generate(llm, [CASES[index]])[0].outputs[0].token_ids)


def test_chat_uses_the_template(llm: LLM) -> None:
    chats = [c for c in CASES if c["messages"]][:2]
    for case, output in zip(chats, llm.chat([c["messages"] for c in chats], GREEDY, use_tqdm=False), strict=True):
        assert output.prompt_token_ids == case["prompt_ids"]
        assert_reference(case, output.outputs[0].token_ids)


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    text = generate(llm, CASES[-1:])[0].outputs[0].text
    stop = text[20:26]
    params = GREEDY.with_(stop=(stop,))
    output = llm.generate({"prompt_token_ids": CASES[-1]["prompt_ids"]}, params, use_tqdm=False)[0].outputs[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_bad_words_do_not_appear(llm: LLM) -> None:
    prompt = {"prompt_token_ids": CASES[-1]["prompt_ids"]}
    words = generate(llm, CASES[-1:])[0].outputs[0].text.split()
    banned = max(words, key=len).strip(".,")
    text = llm.generate(prompt, GREEDY.with_(bad_words=(banned,)), use_tqdm=False)[0].outputs[0].text
    assert banned not in text


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[OpenAI]:
    """The real server on a real socket, over the same engine."""
    with served(AsyncEngine(llm.engine), ServerConfig(port=0)) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, case: dict[str, Any], stream: bool) -> str:
    options: dict[str, Any] = {"model": "smollm2", "temperature": 0, "max_tokens": REFERENCE["max_tokens"], "stream": stream}
    if not case["messages"]:
        reply = client.completions.create(prompt=case["prompt_ids"], **options)
        return "".join(c.choices[0].text for c in reply) if stream else reply.choices[0].text
    reply = client.chat.completions.create(messages=case["messages"], **options)
    if stream:
        return "".join(c.choices[0].delta.content or "" for c in reply if c.choices)
    return str(reply.choices[0].message.content)


def test_http_gives_the_same_text(client: OpenAI) -> None:
    """All cases at once, each streamed and not: the reference's text, where it has no near-tie that may tip either way."""
    with ThreadPoolExecutor(2 * len(CASES)) as pool:
        jobs = [[pool.submit(ask, client, case, stream) for stream in (False, True)] for case in CASES]
        for case, pair in zip(CASES, jobs, strict=True):
            whole, streamed = (job.result() for job in pair)
            if min(case["gaps"]) >= NEAR_TIE:
                assert (whole, streamed) == (case["text"], case["text"]), case["name"]
    assert sum(min(case["gaps"]) >= NEAR_TIE for case in CASES) >= 6, "too few cases decide anything"


def test_other_apis_give_the_same_text(client: OpenAI) -> None:
    case = next(c for c in CASES if c["messages"] and min(c["gaps"]) >= NEAR_TIE)
    url, limit = str(client.base_url).removesuffix("/v1/"), REFERENCE["max_tokens"]
    system = [m["content"] for m in case["messages"] if m["role"] == "system"]
    others: Any = [m for m in case["messages"] if m["role"] != "system"]
    fields: dict[str, Any] = {"extra_body": {"temperature": 0}} | ({"system": system[0]} if system else {})
    with Anthropic(base_url=url, api_key="none", max_retries=0) as anthropic:
        message = anthropic.messages.create(model="smollm2", max_tokens=limit, messages=others, **fields)
    with ollama.Client(host=url) as llama:
        options = {"temperature": 0, "num_predict": limit}
        parts = list(llama.chat(model="smollm2", messages=case["messages"], options=options, stream=True))
    response = client.responses.create(model="smollm2", input=case["messages"], temperature=0, max_output_tokens=limit)
    texts = [message.content[0].text, "".join(part.message.content or "" for part in parts), response.output_text]
    assert texts == [case["text"]] * 3
