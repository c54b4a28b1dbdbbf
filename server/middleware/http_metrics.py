"""HttpMetrics: counts the answers, by route and status."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.errors import REJECTED
from jaxserve.server.metrics import EngineMetrics


class HttpMetrics:
    """The route is its pattern, so that clients cannot make metrics without end."""

    def __init__(self, app: ASGIApp, metrics: EngineMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                handler = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "OPTIONS") else "other"
                self._metrics.on_response(handler, method, message["status"], scope.get("state", {}).get(REJECTED))
            await send(message)

        await self._app(scope, receive, count)
