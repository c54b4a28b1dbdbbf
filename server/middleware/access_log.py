"""AccessLog: gives each request an id, which its answer and its line in the log carry."""

from __future__ import annotations

import logging
import os
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.logs import ACCESS, FIELDS
from jaxserve.server.serving import OWNER

log = logging.getLogger(ACCESS)

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_MAX_PATH = 200  # characters of a path that are logged


class AccessLog:
    """The outermost layer: it sees the refused requests, too. A client's own X-Request-Id is taken if it is harmless."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _ID.fullmatch(given) else os.urandom(16).hex().encode()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        started_s = time.perf_counter()
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if log.isEnabledFor(logging.INFO):
                _write(scope, request_id.decode(), status, time.perf_counter() - started_s)


def _write(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    fields = {
        "method": scope["method"],
        "path": scope["path"][:_MAX_PATH],
        "status": status,
        "seconds": round(seconds, 6),
        "client": scope["client"][0] if scope.get("client") else "",
        "key": scope.get("state", {}).get(OWNER, ""),
        "request_id": request_id,
    }
    text = "{method} {path} {status} {seconds:.3f} s from {client} key {key} id {request_id}".format_map(fields)
    log.info("%s", text, extra={FIELDS: fields})
