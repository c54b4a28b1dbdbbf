"""Running the server: the port, readiness, signals."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import httpx
import pytest

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import ConfigError, EngineDeadError
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.run import bind, run, url_of
from tests.tiny import tiny_engine

pytestmark = pytest.mark.slow  # most start a process, or wait for what takes its time

ROOT = Path(__file__).parents[2]
PROGRAM = textwrap.dedent("""
    from jaxserve.server.app import create_app
    from jaxserve.server.config import ServerConfig
    from jaxserve.server.run import bind, run
    from tests.server.fake_engine import FakeEngine

    def reply(prompt, i):
        engine.is_healthy = prompt != "die"
        engine.stalled_s = 31.0 if prompt == "hang" else 0.0
        return "x" * 20

    engine = FakeEngine(reply)
    engine.token_delay_s = 0.05
    config = ServerConfig(port=0, watchdog_timeout=30, **{options})
    try:
        run(create_app(engine, config), engine, bind(config), config, lambda url: print(url, flush=True))
    finally:
        print("shut down:", engine.is_started and engine.is_shut_down, len(engine.aborted))
""")


def start(**options: int | str) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "-c", PROGRAM.format(options=options)]
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


def test_an_engine_that_hangs_is_given_up() -> None:
    """/health turns red, streams end with an error, and the process ends though the engine's thread cannot."""
    process, url = start(shutdown_timeout=20)
    with process, httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/v1/completions", json={"prompt": "hang", "max_tokens": 50, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
            assert "the engine has stopped" in lines[-2] and lines[-1] == "data: [DONE]"
        assert client.get("/health").status_code == 503
        process.communicate(timeout=20)
    assert process.returncode == 1


def test_https(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout {key}"
    )
    subprocess.run([*make.split(), "-out", certificate], check=True, capture_output=True)
    process, url = start(ssl_certfile=str(certificate), ssl_keyfile=str(key))
    with process:
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=certificate)
        assert httpx.get(f"{url}/health", verify=trusting).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        process.terminate()
    options = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key), "ssl_ca_certs": str(certificate)}
    process, url = start(**options)  # the client needs a certificate, too
    with process:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", verify=trusting)
        trusting.load_cert_chain(certificate, key)
        assert httpx.get(f"{url}/health", verify=trusting).status_code == 200
        process.terminate()


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
    config = ServerConfig(host=host, port=0)
    with bind(config) as sock:
        url = url_of(sock, config)
    assert url.startswith("http://") and (shown is None or shown in url)


@pytest.mark.parametrize(
    "bad",
    [{"port": 65536}, {"port": -1}, {"max_body_bytes": 0}, {"shutdown_timeout": -1}, {"log_format": "xml"}, {"ssl_keyfile": __file__},
     {"ssl_certfile": "/no/such/file"}, {"rate_limit": -1}],
)  # fmt: skip
def test_bad_options(bad: dict[str, int | str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ServerConfig(**bad)


def test_two_failed_steps_in_a_row_end_the_server_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: a runner that raises, the engine, its thread, a client that waits, the process's last words."""
    engine = tiny_engine()

    def fail(plan: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "dispatch", fail)
    served, config = AsyncEngine(engine), ServerConfig(port=0)
    replies: list[httpx.Response] = []

    def ask(url: str) -> None:
        replies.append(httpx.post(f"{url}/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 5}, timeout=20))

    clients = []

    def on_ready(url: str) -> None:
        clients.append(threading.Thread(target=ask, args=(url,)))
        clients[0].start()

    with pytest.raises(EngineDeadError, match="2 steps failed in a row; the last: injected"):
        run(create_app(served, config), served, bind(config), config, on_ready)
    clients[0].join(20)
    assert replies[0].status_code >= 500 and "injected" in replies[0].text
