"""Keys: who may use which route, and what is kept apart by them."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.app import create_app
from jaxserve.server.config import KEY_VARIABLE, ServerConfig
from jaxserve.server.keys import ApiKeys, new_key
from jaxserve.server.middleware.auth import ADMIN, OPEN
from tests.server.conftest import Serve
from tests.server.fake_engine import MODEL, FakeEngine

OPERATOR = "operator-key-0123456789"


@pytest.fixture
def key_file(tmp_path: Path) -> tuple[str, str, str]:
    """A file of two keys, and the keys."""
    alice, alices = new_key("alice", is_admin=False)
    bob, bobs = new_key("bob", is_admin=True)
    path = tmp_path / "keys"
    path.write_text(f"# who may\n{alices.line}\n\n{bobs.line}\n")
    assert alice not in path.read_text() and hashlib.sha256(alice.encode()).hexdigest() in path.read_text()
    return str(path), alice, bob


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_but_the_open_ones_wants_a_key(serve: Serve) -> None:
    engine = FakeEngine()
    url = serve(engine, api_key=OPERATOR)
    paths = create_app(FakeEngine(), ServerConfig()).openapi()["paths"]
    assert len(paths) > 20 and set(OPEN) < set(paths)
    for path, methods in paths.items():
        for method in methods:
            response = httpx.request(method, url + path.replace("{", "").replace("}", ""), json={})
            assert (response.status_code == 401) == (path not in OPEN), path
    for path in ("/openapi.json", "/nothing", "//health", "/health/", "/HEALTH", "/%68ealth/x"):
        assert httpx.get(url + path).status_code == 401, path
    assert not engine.submitted


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Authorization": "Bearer"}, bearer(OPERATOR + "x"), bearer(OPERATOR[:-1]), {"Authorization": f"Basic {OPERATOR}"}, {"x-api-key": "no"},
        {"x-api-key": "no", **bearer(OPERATOR)}, {"Authorization": "Bearer \xff\xfe"},
    ],
)  # fmt: skip
def test_wrong_keys(serve: Serve, headers: dict[str, str]) -> None:
    url = serve(FakeEngine(), api_key=OPERATOR)
    sent = [(name, value.encode("latin-1")) for name, value in headers.items()]
    response = httpx.get(f"{url}/v1/models", headers=sent)
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["WWW-Authenticate"] == "Bearer" and response.headers["Connection"] == "close"


def test_the_clients_send_their_keys(serve: Serve) -> None:
    url = serve(FakeEngine(), api_key=OPERATOR)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=OPERATOR) as client:
        assert client.completions.create(model=MODEL, prompt="a").choices[0].text == "a"
    with anthropic.Anthropic(base_url=url, api_key=OPERATOR) as client:
        assert client.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}]).content
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        client.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}])
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_a_host_header_cannot_change_the_path_that_is_checked(serve: Serve) -> None:
    """Starlette's request.url is made of it, the route is not (CVE-2026-48710)."""
    url = httpx.URL(serve(FakeEngine(), api_key=OPERATOR))
    with socket.create_connection((url.host, url.port), timeout=10) as sock:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x/health?\r\nConnection: close\r\n\r\n")
        assert sock.makefile("rb").readline().split()[1] == b"401"


def test_admin_routes(serve: Serve, key_file: tuple[str, str, str]) -> None:
    path, alice, bob = key_file
    url = serve(FakeEngine(), api_key_file=path)
    assert "/metrics" in ADMIN
    assert httpx.get(f"{url}/metrics", headers=bearer(alice)).status_code == 403
    assert httpx.get(f"{url}/metrics", headers=bearer(bob)).status_code == 200
    assert httpx.get(f"{url}/v1/models", headers=bearer(alice)).status_code == 200


def test_each_key_has_its_own_rate(serve: Serve, key_file: tuple[str, str, str]) -> None:
    path, alice, bob = key_file
    url = serve(FakeEngine(), api_key_file=path, rate_limit=2)
    got = [httpx.get(f"{url}/v1/models", headers=bearer(key)).status_code for key in (alice, alice, alice, bob, bob, bob)]
    assert got == [200, 200, 429, 200, 200, 429]
    assert httpx.get(f"{url}/v1/models").status_code == 401  # who has no key uses up nobody's


def test_what_keys_keep_apart(serve: Serve, key_file: tuple[str, str, str]) -> None:
    path, alice, bob = key_file
    engine = FakeEngine()
    url = serve(engine, api_key_file=path)
    for key in (alice, alice, bob):
        httpx.post(f"{url}/v1/completions", json={"prompt": "a", "cache_salt": "s"}, headers=bearer(key))
    salts = [options["cache_salt"] for options in engine.options]
    assert salts[0] == salts[1] != salts[2] and alice not in salts[0]
    name = httpx.post(f"{url}/v1/responses", json={"input": "a"}, headers=bearer(alice)).json()["id"]
    for key, status in ((alice, 200), (bob, 404)):
        assert httpx.get(f"{url}/v1/responses/{name}", headers=bearer(key)).status_code == status
    assert httpx.post(f"{url}/v1/responses/{name}/cancel", headers=bearer(bob)).status_code == 404
    body = {"input": "b", "previous_response_id": name}
    assert httpx.post(f"{url}/v1/responses", json=body, headers=bearer(bob)).status_code == 404


def test_one_cache_for_all(serve: Serve, key_file: tuple[str, str, str]) -> None:
    path, alice, bob = key_file
    engine = FakeEngine()
    url = serve(engine, api_key_file=path, isolate_prefix_cache=False)
    for key in (alice, bob):
        httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, headers=bearer(key))
    assert [options["cache_salt"] for options in engine.options] == ["", ""]


def test_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, OPERATOR)
    keys = ApiKeys.from_config(ServerConfig())
    key = keys.find(OPERATOR)
    assert key is not None and key.is_admin and keys.find(OPERATOR + " ") is None
    assert ApiKeys.from_config(ServerConfig(api_key="another-key-0123456789")).find(OPERATOR) is None


@pytest.mark.parametrize("key", ["", "short", "x" * 15, "with a space in its middle", "nön-ascii-key-0123456789"])
def test_poor_keys_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="at least 16 printable"):
        ApiKeys.from_config(ServerConfig(api_key=key))


@pytest.mark.parametrize(
    "text", ["", "# none\n", "alice secret-key-0123456789", "alice sha256:12", "a sha256:" + "0" * 64 + " root"]
)
def test_bad_key_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ApiKeys.from_config(ServerConfig(api_key_file=str(path)))
    assert "new-key" in str(caught.value) and "secret" not in str(caught.value)


def test_names_of_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a key's name"):
        new_key("a b\n", is_admin=False)
    path = tmp_path / "keys"
    path.write_text("".join(new_key("same", is_admin=False)[1].line + "\n" for _ in range(2)))
    with pytest.raises(ConfigError, match="same name"):
        ApiKeys.from_config(ServerConfig(api_key_file=str(path)))
