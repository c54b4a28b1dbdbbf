"""use_beam_search on both endpoints: what reaches the engine, and what is refused."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.fake_engine import MODEL, FakeEngine

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "use_beam_search": True}
TEXT: dict[str, Any] = {"prompt": "hi", "use_beam_search": True}


def path_of(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def test_completions(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"use_beam_search": True, "length_penalty": 2, "early_stopping": "never"}
    reply = client.completions.create(model=MODEL, prompt="abc", n=2, best_of=4, extra_body=extra)
    assert [choice.index for choice in reply.choices] == [0, 1]
    ((_, params),) = engine.submitted
    assert (params.use_beam_search, params.length_penalty, params.early_stopping) == (True, 2.0, "never")
    assert (params.n, params.num_samples) == (2, 4)


@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "completions"])
def test_the_models_sampling_defaults_do_not_count(http: httpx.Client, engine: FakeEngine, body: dict[str, Any]) -> None:
    """They say how to draw: temperature 0.6, top_k 20."""
    response = http.post(path_of(body), json=body | {"n": 3, "early_stopping": True})
    assert response.status_code == 200
    assert len(response.json()["choices"]) == 3
    ((_, params),) = engine.submitted
    assert (params.use_beam_search, params.early_stopping, params.num_samples, params.top_k) == (True, True, 3, 0)


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        (CHAT | {"stream": True}, "use_beam_search", "cannot be streamed"),
        (TEXT | {"stream": True}, "use_beam_search", "cannot be streamed"),
        (TEXT | {"n": 3, "best_of": 2}, "best_of", "at least n"),
        (CHAT | {"best_of": 2}, "best_of", "not supported"),
        (CHAT | {"temperature": 0.6}, "temperature", "0 or 1 with use_beam_search"),
        (CHAT | {"logprobs": True}, "logprobs", "does not go with use_beam_search"),
        (TEXT | {"stop": "x"}, "stop", "does not go with use_beam_search"),
        (TEXT | {"early_stopping": "soon"}, "early_stopping", "'never'"),
        (TEXT | {"use_beam_search": False, "length_penalty": 2.0}, "length_penalty", "needs use_beam_search"),
    ],
)
def test_refused(http: httpx.Client, engine: FakeEngine, body: dict[str, Any], param: str, text: str) -> None:
    response = http.post(path_of(body), json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert text in error["message"]
    assert not engine.submitted
