"""Running the server: the port, readiness, signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.run import bind, url_of

ROOT = Path(__file__).parents[2]
PROGRAM = textwrap.dedent("""
    from jaxserve.server.app import create_app
    from jaxserve.server.config import ServerConfig
    from jaxserve.server.run import bind, run
    from tests.server.fake_engine import FakeEngine

    def reply(prompt, i):
        engine.is_healthy = prompt != "die"
        return "x" * 20

    engine = FakeEngine(reply)
    engine.token_delay_s = 0.05
    config = ServerConfig(port=0, shutdown_timeout={shutdown_timeout})
    try:
        run(create_app(engine, config), engine, bind(config), config, lambda url: print(url, flush=True))
    finally:
        print("shut down:", engine.is_started and engine.is_shut_down, len(engine.aborted))
""")


def start(**options: int) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "-c", PROGRAM.format(**options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_requests_finish(sig: signal.Signals) -> None:
    process, url = start(shutdown_timeout=20)
    with process, httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 50, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(sig)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.communicate(timeout=20)[0] == "shut down: True 0\n"
    assert process.returncode == 0


def test_requests_that_take_too_long_are_cut_off() -> None:
    process, url = start(shutdown_timeout=0)
    with process, httpx.Client(base_url=url, timeout=20) as client:
        with (
            pytest.raises(httpx.RemoteProtocolError),
            client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 50, "stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            list(lines)
        assert process.communicate(timeout=20)[0] == "shut down: True 1\n"
    assert process.returncode == 0


def test_a_server_does_not_outlive_its_engine() -> None:
    """Streams end with an error, /health turns red, and then the process ends, by itself and with a failure."""
    process, url = start(shutdown_timeout=20)
    with process, httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 50, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "die"}).status_code == 500
            health = client.get("/health")
            assert health.status_code == 503 and health.json()["error"]["code"] == "engine_dead"
            rest = [line for line in lines if line]
            assert "the engine has stopped" in rest[-2] and rest[-1] == "data: [DONE]"
        assert process.communicate(timeout=20)[0] == "shut down: True 0\n"
    assert process.returncode == 1


def test_port_in_use() -> None:
    with bind(ServerConfig(port=0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: Address already in use.*--port"):
            bind(ServerConfig(port=port))


def test_nobody_connects_before_the_server_runs() -> None:
    with bind(ServerConfig(port=0)) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname(), timeout=5)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on .*{host}.*--host"):
        bind(ServerConfig(host=host, port=0))


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("localhost", None)])
def test_url(host: str, shown: str | None) -> None:
    with bind(ServerConfig(host=host, port=0)) as sock:
        url = url_of(sock)
    assert url.startswith("http://") and (shown is None or shown in url)


@pytest.mark.parametrize("bad", [{"port": 65536}, {"port": -1}, {"max_body_bytes": 0}, {"shutdown_timeout": -1}])
def test_bad_options(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ServerConfig(**bad)
