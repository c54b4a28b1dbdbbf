"""Groups whose processes are threads: they may not end the tests' own process, nor outlive their test."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from jaxserve.multihost import leader
from jaxserve.multihost.wire import Channel


@pytest.fixture(autouse=True)
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The statuses with which leaders and workers would have ended their processes; their threads end by SystemExit."""
    statuses: list[int] = []
    sockets: list[socket.socket] = []
    make = Channel.__init__

    def leave(status: int) -> None:
        statuses.append(status)
        raise SystemExit(status)

    def recorded(channel: Channel, sock: socket.socket) -> None:
        sockets.append(sock)
        make(channel, sock)

    for module in ("leader", "worker"):
        monkeypatch.setattr(f"jaxserve.multihost.{module}.leave", leave)
    monkeypatch.setattr(Channel, "__init__", recorded)
    monkeypatch.setattr(leader, "GOODBYE_S", 0.1)  # threads stay where processes would have gone
    yield statuses
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    for thread in threading.enumerate():
        if thread.name.startswith("group-"):
            thread.join(10)
            assert not thread.is_alive(), thread.name
    for sock in sockets:
        sock.close()
