"""Runs an app under uvicorn: takes the port, says when it is ready, and stops cleanly on a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from jaxserve.errors import ConfigError, EngineDeadError
from jaxserve.server.config import ServerConfig
from jaxserve.server.connection import protocol_class

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


def url_of(sock: socket.socket, config: ServerConfig) -> str:
    """The bound socket's address as a URL that a browser on this machine can open."""
    scheme = "http" if config.ssl_certfile is None else "https"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def run(app: FastAPI, engine: AsyncEngine, sock: socket.socket, config: ServerConfig, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM; running requests then get `shutdown_timeout` seconds, a second Ctrl-C ends at once.

    Args:
        on_ready: called with the URL once the server accepts connections.

    Raises:
        EngineDeadError: the engine has stopped, and so the server has.
    """
    server = Server(app, sock, config, on_ready, engine)
    server.run(sockets=[sock])
    if server.is_hung:  # its thread cannot be ended, and would keep the process from ending
        print("error: the engine hangs; start the server again", file=sys.stderr, flush=True)
        os._exit(1)
    if server.died_s is not None:
        raise EngineDeadError(f"the engine has stopped ({engine.cause or 'the log says why'}); start the server again")


class Server(uvicorn.Server):
    """uvicorn, with a call when it is ready, a watch over the engine, and a normal return after a signal.

    Attributes:
        died_s: time.monotonic() when the engine was found dead.
        is_hung: whether it was found hanging.
    """

    def __init__(
        self,
        app: FastAPI,
        sock: socket.socket,
        config: ServerConfig,
        on_ready: Callable[[str], None],
        engine: AsyncEngine | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_class(config),
                ws="none",
                log_config=None,  # logs.py's is the process's
                access_log=False,
                timeout_graceful_shutdown=config.shutdown_timeout,
                timeout_keep_alive=config.keep_alive_timeout,
                server_header=False,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                ssl_ca_certs=config.ssl_ca_certs,
                ssl_cert_reqs=ssl.CERT_REQUIRED if config.ssl_ca_certs is not None else ssl.CERT_NONE,
            )
        )
        self.url = url_of(sock, config)
        self._on_ready = on_ready
        self._engine = engine
        self._watchdog_s = config.watchdog_timeout
        self.died_s: float | None = None
        self.is_hung = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready(self.url)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._engine is not None and self.died_s is None:
            if self._engine.stalled_s > self._watchdog_s:
                self.is_hung = True
                self._engine.give_up(f"a step has not ended within {self._watchdog_s} seconds")
            if not self._engine.is_healthy:
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
