"""Answers that stop when their client goes: the disconnect watch, and the response that streams server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, cast

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PRESENCE = "jaxserve.presence"  # the extension of a request's scope


class Presence:
    """Whether a connection's client is there.

    Attributes:
        on_leave: called when it goes.
    """

    def __init__(self) -> None:
        self.has_gone = False
        self.on_leave: Callable[[], object] | None = None

    def leave(self) -> None:
        self.has_gone = True
        if self.on_leave is not None:
            self.on_leave()


async def until_disconnect[T](scope: Scope, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the client goes first.

    Args:
        scope: the request's, from a GuardedProtocol.

    Raises:
        ClientDisconnect: the client has gone.
    """
    presence: Presence = scope["extensions"][PRESENCE]
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    if presence.has_gone:
        work.close()
        raise ClientDisconnect
    presence.on_leave = task.cancel
    try:
        return await work
    except asyncio.CancelledError:
        if presence.has_gone and not task.uncancel():  # else somebody else has cancelled it, too
            raise ClientDisconnect from None
        raise
    finally:
        presence.on_leave = None


class EventStream(StreamingResponse):
    """A stream of server-sent events; `on_close` is called however it ends, even before the first event."""

    def __init__(
        self, events: AsyncGenerator[bytes], on_close: Callable[[], None], media_type: str = "text/event-stream"
    ) -> None:
        super().__init__(events, media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                with suppress(ClientDisconnect):
                    await until_disconnect(scope, self.stream_response(send))
        finally:
            self._on_close()
