"""/health, /version, /v1/models and the chat page."""

from __future__ import annotations

import re

import httpx
import openai
import pytest

import jaxserve
from tests.server.conftest import Serve
from tests.server.fake_engine import MAX_MODEL_LEN, MODEL, FakeEngine


def test_health_follows_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    assert http.get("/health").status_code == 200
    engine.is_healthy = False
    response = http.get("/health")
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": jaxserve.__version__}


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by, model.max_model_len) == (MODEL, "model", "jaxserve", MAX_MODEL_LEN)
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_served_model_name(serve: Serve) -> None:
    engine = FakeEngine()
    object.__setattr__(engine.config.model, "served_model_name", "alias")
    url = serve(engine)
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["alias"]
    assert httpx.post(f"{url}/v1/completions", json={"model": "alias", "prompt": "a"}).status_code == 200
    assert httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "a"}).status_code == 404


def test_chat_page_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    response = http.get("/")
    assert response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"(https?:)?//[\w-]+\.\w|innerHTML|\beval\(", response.text)


def test_openapi_describes_the_bodies(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert {"anyOf"} <= set(schema["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"])
