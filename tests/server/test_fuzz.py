"""Bodies that nobody would send: never a 500, never a hang, and a server that is well afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.server.protocol import ChatRequest, CompletionRequest
from jaxserve.server.responses.protocol import ResponsesRequest
from tests.server.tiny_server import TinyServer, tiny_server

pytestmark = pytest.mark.slow

USUAL = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
JSON_HEADER = {"Content-Type": "application/json"}

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3},
    "/v1/responses": {"input": "abc", "max_output_tokens": 3},
    "/v1/messages": {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 3},
    "/api/chat": {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "options": {"num_predict": 3}},
    "/api/generate": {"model": "tiny", "prompt": "abc", "options": {"num_predict": 3}},
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [1, 2]},
}
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *ResponsesRequest.model_fields})

numbers = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 95, 96, 255, 256, 257]),
    st.floats(allow_nan=False, allow_infinity=False),
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(["", "\x00", "\u2028", "auto", "text"])
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def server() -> Iterator[TinyServer]:
    with tiny_server(rate_limit=0) as server:
        yield server


@pytest.fixture(autouse=True)
def _is_well_afterwards(server: TinyServer) -> Iterator[None]:
    yield
    server.assert_well()


def assert_civil(response: httpx.Response) -> None:
    """Answered, or refused with a reason that gives nothing away."""
    assert response.status_code < 500, (response.request.content, response.text)
    for secret in ("Traceback", " object at 0x", ".py", "/home", "/work"):
        assert secret not in response.text, response.text


@settings(USUAL, max_examples=300)
@given(path=st.sampled_from(sorted(BODIES)), changes=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
def test_fields_of_all_kinds(server: TinyServer, path: str, changes: dict[str, Any]) -> None:
    if isinstance(changes.get("n"), int) and changes["n"] > 8:
        changes["n"] = 8  # allowed, but slow
    body = json.dumps(BODIES[path] | changes).encode()
    assert_civil(server.client.post(path, content=body, headers=JSON_HEADER))


@settings(USUAL, max_examples=150)
@given(path=st.sampled_from(sorted(BODIES)), data=st.data())
def test_broken_texts(server: TinyServer, path: str, data: st.DataObject) -> None:
    text = json.dumps(BODIES[path]).encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    middle = data.draw(
        st.one_of(
            st.binary(max_size=10), st.sampled_from([b"NaN", b"Infinity", b'"\\ud800"', b"1e999", b"[" * 50, b"{", b'"a":1,'])
        )
    )
    assert_civil(server.client.post(path, content=text[:start] + middle + text[end:], headers=JSON_HEADER))


@settings(USUAL, max_examples=100)
@given(
    path=st.sampled_from([*sorted(BODIES), "/v1/models", "/nothing"]),
    body=st.binary(max_size=200),
    method=st.sampled_from(["POST", "GET", "PUT", "PATCH", "TRACE"]),
)
def test_bytes(server: TinyServer, path: str, body: bytes, method: str) -> None:
    assert_civil(server.client.request(method, path, content=body, headers=JSON_HEADER))


def test_the_openapi_document(server: TinyServer) -> None:
    """Every operation, with what its schema allows and with what it does not."""
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20

    def probe(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("n"), int) and case.body["n"] > 8:
            case.body["n"] = 8
        response = case.call(base_url=server.url, timeout=30)
        assert response.status_code < 500, (case.as_curl_command(), response.text)

    for operation in operations:
        settings(USUAL, max_examples=6)(given(case=operation.as_strategy())(probe))()


ODD: list[dict[str, Any]] = [
    {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [[1], []]}, {"prompt": [96]}, {"prompt": [-1]}, {"prompt": [2**40]},
    {"prompt": "a", "min_tokens": 10, "max_tokens": None}, {"prompt": "a", "min_tokens": 10**9, "max_tokens": None},
    {"prompt": "a" * 255}, {"prompt": "a" * 256}, {"prompt": "a" * 10**6}, {"prompt": "a", "max_tokens": 255}, {"prompt": "a", "max_tokens": 256},
    {"prompt": "a", "stop_token_ids": [-1, 96, 2**31]}, {"prompt": "a", "allowed_token_ids": [96]}, {"prompt": "a", "allowed_token_ids": [5, 5]},
    {"prompt": "a", "logit_bias": {"96": 1}}, {"prompt": "a", "logit_bias": {"-1": 1}}, {"prompt": "a", "logit_bias": {"5": -100, "6": 100}},
    {"prompt": "a", "bad_words": ["\U0001f600", "é", " "]}, {"prompt": "a", "bad_words": ["a" * 1000]}, {"prompt": "a", "bad_words": ["abc", "ab", "a"]},
    {"prompt": "a", "presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1e30, "max_tokens": 20},
    {"prompt": "a", "repetition_penalty": 1e-30, "max_tokens": 20}, {"prompt": "a", "temperature": 1e-30}, {"prompt": "a", "temperature": 1e30},
    {"prompt": "a", "top_k": 10**9}, {"prompt": "a", "top_p": 1e-30, "min_p": 1}, {"prompt": "a", "seed": -(2**63)}, {"prompt": "a", "seed": 2**64 - 1},
    {"prompt": "a", "logprobs": 20, "echo": True, "prompt_logprobs": 20}, {"prompt": "a", "n": 8, "best_of": 8}, {"prompt": "a", "n": 5, "stream": True},
    {"prompt": "a", "use_beam_search": True, "n": 4, "length_penalty": -1e30}, {"prompt": "a", "stop": ["\x00"] * 64}, {"prompt": "a", "priority": 1},
    {"prompt": "a", "ignore_eos": True, "stop": "a" * 1000, "max_tokens": 50}, {"prompt": ["a"] * 100}, {"prompt": "a", "cache_salt": "\x00"},
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(ODD)))
def test_odd_requests_leave_the_engine_well(server: TinyServer, index: int) -> None:
    assert_civil(server.client.post("/v1/completions", json=ODD[index]))
