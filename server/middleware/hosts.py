"""AllowedHosts: the server answers only under its own names. Keeps foreign web pages from a server without keys."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.errors import InvalidRequestError
from jaxserve.server.middleware.refuse import refuse


class AllowedHosts:
    """Refuses a request whose Host is none of the names, or that has several."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.encode("idna") if not host.isascii() else host.encode() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = [value for name, value in scope["headers"] if name == b"host"]
            if len(given) != 1 or _without_port(given[0].lower()) not in self._hosts:
                text = "this server is not asked under that name; --allowed-hosts can add it"
                await refuse(InvalidRequestError(text, param="Host"), scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(host: bytes) -> bytes:
    if host.startswith(b"["):
        return host[1:].partition(b"]")[0]
    return host.partition(b":")[0]
