"""Runs an app under uvicorn: takes the port, says when it is ready, and stops cleanly on a signal."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from jaxserve.errors import ConfigError, EngineDeadError
from jaxserve.server.config import ServerConfig

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine

DEAD_ENGINE_S = 1.0  # how long a server outlives its engine, so that clients and probes learn why


def bind(config: ServerConfig) -> socket.socket:
    """Takes the port, so that a busy one is found before a model is loaded. Nobody can connect until the server runs.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as e:
        raise ConfigError(f"cannot listen on {config.host!r}: {e.strerror or e}. Give --host an address of this machine.") from e
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        sock.close()
        where = f"{config.host}:{config.port}"
        raise ConfigError(
            f"cannot listen on {where}: {e.strerror}. Stop what uses it, or choose another --port or --host."
        ) from e
    return sock


def url_of(sock: socket.socket) -> str:
    """The bound socket's address as a URL that a browser on this machine can open."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, engine: AsyncEngine, sock: socket.socket, config: ServerConfig, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM; running requests then get `shutdown_timeout` seconds, a second Ctrl-C ends at once.

    Args:
        on_ready: called with the URL once the server accepts connections.

    Raises:
        EngineDeadError: the engine has stopped, and so the server has.
    """
    server = Server(app, sock, config, on_ready, lambda: engine.is_healthy)
    server.run(sockets=[sock])
    if server.died_s is not None:
        raise EngineDeadError("the engine has stopped, the log says why; start the server again")


class Server(uvicorn.Server):
    """uvicorn, with a call when it is ready, and a normal return after a signal or the engine's end.

    Attributes:
        died_s: time.monotonic() when the engine was found dead.
    """

    def __init__(
        self,
        app: FastAPI,
        sock: socket.socket,
        config: ServerConfig,
        on_ready: Callable[[str], None],
        is_healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                log_level="info" if config.access_log else "warning",
                access_log=config.access_log,
                timeout_graceful_shutdown=config.shutdown_timeout,
                server_header=False,
            )
        )
        self._url = url_of(sock)
        self._on_ready = on_ready
        self._is_healthy = is_healthy
        self.died_s: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready(self._url)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self.died_s is None and not self._is_healthy():
            self.died_s = time.monotonic()
        if self.died_s is not None and time.monotonic() >= self.died_s + DEAD_ENGINE_S:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but without raising the signal anew at the end: to stop when told to is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
