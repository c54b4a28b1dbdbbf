"""GuardedProtocol: uvicorn's HTTP connection with what it lacks: deadlines, a limit of the head, and of connections.

An answer's head and its body leave in one piece, where they come together.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import describe_limit
from jaxserve.server.streaming import PRESENCE, Presence

if TYPE_CHECKING:
    from asyncio import TimerHandle


class GuardedProtocol(HttpToolsProtocol):
    """One connection. The body's size is BodyLimits'."""

    limits: ClassVar[ServerConfig]

    _deadline: TimerHandle | None = None  # for what the client is to send
    _write_deadline: TimerHandle | None = None  # for what it is to read
    _in_head = True
    _in_message = False
    _head_bytes = 0  # of the headers that are complete
    _raw_bytes = 0  # since the head began
    _is_head_too_long = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._presence = Presence()
        if len(self.connections) > self.limits.max_connections:
            self._end_with(503, "too many connections; try again later")
            return
        self._expect(self.limits.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._presence.leave()
        self._expect_nothing()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._raw_bytes += len(data)
            if self._raw_bytes > self.limits.max_header_bytes:
                self._is_head_too_long = True
                self.send_400_response("")
        self._expect_the_rest()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._head_bytes = self._raw_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._raw_bytes = 0
        self._expect_nothing()
        super().on_headers_complete()
        cast(dict[str, Any], self.cycle.scope)["extensions"] = {PRESENCE: self._presence}
        self.cycle.transport = cast(asyncio.Transport, HeadAndBody(self.transport, self.loop))

    def on_message_complete(self) -> None:
        self._in_message = False
        self._expect_nothing()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_the_rest()

    def send_400_response(self, msg: str) -> None:
        if self._is_head_too_long:
            self._end_with(431, f"the request's head may have {self.limits.max_header_bytes:,} bytes")
        else:
            self._end_with(400, "the request is not valid HTTP")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.limits.max_header_bytes:
            self._is_head_too_long = True
            raise ValueError("the head is too long")  # the parser stops, and send_400_response is called

    def _expect_the_rest(self) -> None:
        """Sets a deadline for a message that has begun and not ended; most come whole, and need none."""
        if self._in_message and self._deadline is None and not self.transport.is_closing():
            if self._in_head:
                self._expect(self.limits.header_timeout)
            elif not self.pipeline:  # else it is us who do not read
                self._expect(self.limits.body_timeout)

    def _expect(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        if self._in_head and self._raw_bytes:
            self._end_with(408, f"the request's head did not come within {self.limits.header_timeout} seconds")
        elif self._in_message and not self._in_head and not self.cycle.response_started:
            self._end_with(408, f"the request's body did not come within {self.limits.body_timeout} seconds")
        else:
            self.transport.close()

    def _end_with(self, status: int, message: str) -> None:
        """Answers what has not become a request, and closes."""
        line, body = describe_limit(status, message)
        head = b"%b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (line, len(body))
        self.transport.write(head + body)
        self.transport.close()


class HeadAndBody:
    """What one answer writes to: its head waits for the first piece of the body, or for the loop's next round.

    A system call for each took a tenth of a short request's time.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None
        self._has_begun = False
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._head = data
            self._loop.call_soon(self._flush)
        elif self._head is not None:
            self._transport.write(self._head + data)
            self._head = None
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head is not None:
            self._transport.write(self._head)
            self._head = None


def protocol_class(config: ServerConfig) -> type[asyncio.Protocol]:
    """The protocol with a server's own limits."""
    return cast(type[asyncio.Protocol], type("Connection", (GuardedProtocol,), {"limits": config}))
