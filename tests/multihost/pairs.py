"""Leaders and workers in one process, joined by sockets, without jax.distributed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from jaxserve.multihost.wire import Channel


def channels() -> tuple[Channel, Channel]:
    """Two ends of a TCP connection on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return Channel(one), Channel(other)


def free_port() -> int:
    """A port that is free, and the next one as well."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


class InThread:
    """A call on a thread of its own, and what it gives or raises."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, arguments), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self._result = call(*arguments)
        except BaseException as error:  # noqa: BLE001  raised by `result`
            self._error = error

    def result(self, timeout_s: float = 20) -> Any:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "it has not ended"
        if self._error is not None:
            raise self._error
        return self._result
