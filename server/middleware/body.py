"""BodyLimits: reads a request's body before the routes do, and no more of it and no deeper than is allowed."""

from __future__ import annotations

import re
from itertools import accumulate

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.errors import InvalidRequestError
from jaxserve.server.errors import BodyTooLargeError
from jaxserve.server.middleware.refuse import refuse

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class BodyLimits:
    """Hands the body on in one piece."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_json_depth: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_depth = max_json_depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:
                return  # the client has gone
            if nesting(body, self._max_depth) > self._max_depth:
                raise InvalidRequestError(f"the body's brackets may be nested {self._max_depth} deep")
        except (BodyTooLargeError, InvalidRequestError) as e:
            await refuse(e, scope, receive, send)
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client goes before its end."""
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self._check(int(declared) if declared.isdigit() and len(declared) < 20 else self._max_bytes + 1)
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            self._check(size)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLargeError(f"a body may have {self._max_bytes:,} bytes")


def nesting(body: bytes, enough: int) -> int:
    """How deep the brackets of a JSON text are nested; perhaps less than so where it is no more than `enough` at most."""
    if body.count(b"[") + body.count(b"{") <= enough:
        return 0
    brackets = _STRING.sub(b"", body).translate(None, _OTHERS)
    return max(accumulate(_STEPS[bracket] for bracket in brackets), default=0)
