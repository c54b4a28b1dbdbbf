"""What a client may send, how much, how deep, how fast and how slowly."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from jaxserve.server.middleware.body import nesting
from jaxserve.server.middleware.rate_limit import TokenBuckets
from tests.server.conftest import Serve, wait_for
from tests.server.fake_engine import FakeEngine


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    parts = httpx.URL(url)
    with socket.create_connection((parts.host, parts.port), timeout=20) as sock:
        yield sock


def answer(sock: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            data += chunk
    return data


def until(sock: socket.socket, end: bytes) -> bytes:
    """What comes, up to and with an end."""
    data = b""
    while not data.endswith(end):
        chunk = sock.recv(65536)
        assert chunk, data
        data += chunk
    return data


def post(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: 127.0.0.1", b"Content-Type: application/json", *headers]
    lines.append(b"Content-Length: %d" % (len(body) if length is None else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# Time


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
def test_a_head_that_does_not_end(serve: Serve, sent: bytes) -> None:
    url = serve(FakeEngine(), header_timeout=1)
    with connected(url) as sock:
        sock.sendall(sent)
        got = answer(sock)
    assert (b" 408 " in got) == bool(sent)


def test_a_head_that_drips(serve: Serve) -> None:
    url = serve(FakeEngine(), header_timeout=1)
    started_s = time.monotonic()
    with connected(url) as sock, pytest.raises(OSError):
        sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        while time.monotonic() < started_s + 15:
            sock.sendall(b"X-Drip: 1\r\n")
            time.sleep(0.1)


def test_a_body_that_does_not_end(serve: Serve) -> None:
    engine = FakeEngine()
    url = serve(engine, body_timeout=1)
    with connected(url) as sock:
        sock.sendall(post(b'{"prompt": "a', length=100))
        got = answer(sock)
    head, _, body = got.partition(b"\r\n\r\n")
    assert b" 408 " in head and json.loads(body)["error"]["code"] == "request_timeout"
    assert not engine.submitted


def test_a_body_that_nobody_waits_for(serve: Serve) -> None:
    """A GET whose body drips on after its answer."""
    url = serve(FakeEngine(), body_timeout=1)
    started_s = time.monotonic()
    with connected(url) as sock, pytest.raises(OSError):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n")
        while time.monotonic() < started_s + 15:
            sock.sendall(b"x")
            time.sleep(0.1)


def test_a_body_behind_a_slow_answer_has_its_own_time(serve: Serve) -> None:
    """Meanwhile it is the server who does not read."""
    engine = FakeEngine(lambda prompt, i: "x" * 15)
    engine.token_delay_s = 0.1
    url = serve(engine, body_timeout=1)
    first, second = post(b'{"prompt": "a"}'), post(b'{"prompt": "b", "max_tokens": 1}')
    with connected(url) as sock:
        sock.sendall(first + second[:-10])
        assert b" 200 " in until(sock, b"}")
        sock.sendall(second[-10:])
        assert b" 200 " in until(sock, b"}")
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 2)
        got = until(sock, b"}")
        assert (got if got.count(b" 200 ") == 2 else got + until(sock, b"}")).count(b" 200 ") == 2
    with connected(url) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert b" 200 " in until(sock, b"}")


def test_an_idle_connection(serve: Serve) -> None:
    url = serve(FakeEngine(), keep_alive_timeout=1)
    with connected(url) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b" 200 " in answer(sock)


@pytest.mark.slow
def test_two_requests_on_a_connection_have_each_their_time(serve: Serve) -> None:
    url = serve(FakeEngine(), header_timeout=1, keep_alive_timeout=20)
    with connected(url) as sock:
        for _ in range(2):
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b'{"version":' in until(sock, b"}")
            time.sleep(1.2)
        sock.sendall(b"GET /version")
        assert b" 408 " in answer(sock)


def test_an_answer_that_nobody_reads(serve: Serve) -> None:
    engine = FakeEngine(lambda prompt, i: "x" * 300)
    url = serve(engine, write_timeout=1)
    body = json.dumps({"prompt": "a", "n": 128, "stream": True, "max_tokens": 300}).encode()
    with connected(url) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(post(body))
        wait_for(lambda: bool(engine.aborted))


# Size


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"x" * 3000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"GET /" + b"x" * 3000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Endless: " + b"x" * 3000,
    ],
)
def test_a_long_head(serve: Serve, head: bytes) -> None:
    url = serve(FakeEngine(), max_header_bytes=2000)
    with connected(url) as sock:
        sock.sendall(head)
        assert b" 431 " in answer(sock)
    assert httpx.get(url, headers={"X-Long": "x" * 1000}).status_code == 200


def test_the_head_and_a_long_body_in_one_piece(serve: Serve) -> None:
    url = serve(FakeEngine(), max_header_bytes=2000)
    assert httpx.post(f"{url}/tokenize", json={"prompt": "x", "model": None, "cache": [], " " * 5000: None}).status_code == 200


def test_a_large_body(serve: Serve) -> None:
    engine = FakeEngine()
    url = serve(engine, max_body_bytes=1000)
    for headers, body in [
        ({}, b"x" * 1001),
        ({"Content-Length": "9" * 30}, b""),
        ({"Transfer-Encoding": "chunked"}, b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n"),
    ]:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) or f"Content-Length: {len(body)}\r\n"
        with connected(url) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head.encode() + b"\r\n" + body)
            got = answer(sock)
        status, _, content = got.partition(b"\r\n\r\n")
        assert b" 413 " in status or b" 400 " in status
        assert json.loads(content)["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
    assert len(engine.submitted) == 1


def test_too_many_connections(serve: Serve) -> None:
    url = serve(FakeEngine(), max_connections=3)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(url)) for _ in range(3)]
        with connected(url) as one_more:
            assert b" 503 " in answer(one_more)
        socks[0].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b" 200 " in until(socks[0], b"}")
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_no_http_at_all(serve: Serve) -> None:
    with connected(serve(FakeEngine())) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00" * 10)
        got = answer(sock)
    assert b" 400 " in got and json.loads(got.partition(b"\r\n\r\n")[2])["error"]["message"]


# Depth


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (b"[" * 70 + b"]" * 70, 70), (b'{"a":' * 70 + b"1" + b"}" * 70, 70), (b"[]" * 500, 1), (b'["' + b"[" * 500 + b'"]', 1),
        (b'["\\"' + b"[" * 500 + b'"]', 1), (b"[[1],[2],[3]]" * 50, 2), (b"]" * 100, 0), (b'"' + b"[" * 70, 70),
    ],
)  # fmt: skip
def test_nesting(text: bytes, depth: int) -> None:
    assert nesting(text, 10) == depth


def test_nesting_is_found_quickly() -> None:
    """The scan is linear: these would take minutes if it were not."""
    for text in (b'"\\' * 2**21, b'"' * 2**21, b"[" * 2**22, b'{"a' * 2**20, b'"' + b"\\\\" * 2**21 + b"[" * 100):
        nesting(text, 10)


def test_deep_bodies_are_refused(serve: Serve) -> None:
    url = serve(FakeEngine(), max_json_depth=5)
    deep = {"prompt": "a", "metadata": [[[[[1]]]]]}
    response = httpx.post(f"{url}/v1/completions", json=deep)
    assert response.status_code == 400 and "5 deep" in response.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "metadata": [[[1]]]}).status_code == 200
    assert httpx.post(f"{url}/v1/completions", json={"prompt": [[1], [2]] * 20}).status_code == 200


# Rate


def test_rate_limit(serve: Serve) -> None:
    url = serve(FakeEngine(), rate_limit=3)
    with httpx.Client(base_url=url) as client:
        responses = [client.get("/v1/models") for _ in range(4)]
        assert [response.status_code for response in responses] == [200, 200, 200, 429]
        assert 1 <= int(responses[-1].headers["Retry-After"]) <= 20
        assert responses[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert client.get("/health").status_code == 200


def test_token_buckets() -> None:
    now = [0.0]
    buckets = TokenBuckets(60, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(61)] == [0.0] * 60 + [1.0]
    assert buckets.take("b") == 0
    now[0] += 2.5
    assert [buckets.take("a") == 0 for _ in range(3)] == [True, True, False]
    now[0] += 1e6
    assert [buckets.take("a") for _ in range(61)].count(0.0) == 60  # no more than a bucket is saved up


def test_clients_beyond_number_do_not_fill_the_memory() -> None:
    buckets = TokenBuckets(60)
    for i in range(30_000):
        buckets.take(str(i))
    assert len(buckets._buckets) <= 10_001


# Names


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost:8000", 200), ("LocalHost", 200), ("[::1]:8000", 200), ("evil.example", 400), ("", 400)],
)
def test_a_local_server_is_asked_under_local_names(serve: Serve, host: str, status: int) -> None:
    """Else a web page could reach it under a name of its own (DNS rebinding)."""
    assert httpx.get(f"{serve(FakeEngine())}/v1/models", headers={"Host": host}).status_code == status


def test_allowed_hosts(serve: Serve) -> None:
    url = serve(FakeEngine(), allowed_hosts="llm.example, Other.example")
    got = {host: httpx.get(url, headers={"Host": host}).status_code for host in ("llm.example:80", "other.example", "localhost")}
    assert list(got.values()) == [200, 200, 400]
    assert httpx.get(serve(FakeEngine(), allowed_hosts="*"), headers={"Host": "any"}).status_code == 200


def test_cors(serve: Serve) -> None:
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    closed, opened = serve(FakeEngine()), serve(FakeEngine(), cors_origins="https://app.example", api_key="key-0123456789abcdef")
    assert "access-control-allow-origin" not in httpx.options(f"{closed}/v1/models", headers=asks).headers
    preflight = httpx.options(f"{opened}/v1/models", headers=asks)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://app.example"
    other = httpx.options(f"{opened}/v1/models", headers=asks | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    refused = httpx.get(f"{opened}/v1/models", headers={"Origin": "https://app.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"


def test_a_page_elsewhere_cannot_post_a_form(http: httpx.Client, engine: FakeEngine) -> None:
    """Browsers send text/plain without asking first; it is not taken for JSON."""
    response = http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400 and not engine.submitted
