"""JsonRoute: a route that takes a JSON body. FastAPI documents it; the body is read, and the endpoint called, here."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.errors import InvalidRequestError
from jaxserve.server.errors import NO_JSON, answer_to

Endpoint = Callable[[Any, Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """Gives the endpoint its body, validated, and the request. An endpoint without a body goes FastAPI's way.

    FastAPI's way took half of a short request's time: three exit stacks, dependencies, two layers of exception handlers, and a
    validation of what had been parsed before. Such a route must stand in the app's own list: `include_router` wraps routes anew.
    """

    def __init__(self, path: str, endpoint: Endpoint, **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.takes_body = self.body_field is not None
        if self.body_field is not None:
            self._model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]
            self.app = self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        try:
            response = await self._respond(Request(scope, receive, send))
        except Exception as e:  # noqa: BLE001  whatever it is, it has an answer
            response = answer_to(e, scope)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        content = (await request.receive()).get("body")  # BodyLimits hands it on in one piece
        if not content or not _says_json(request.scope, needs_type=self.strict_content_type is not False):
            raise InvalidRequestError(NO_JSON)
        response: Response = await self.endpoint(self._model.model_validate_json(content), request)
        return response


class JsonRoutes:
    """A layer that takes requests to those routes straight to them; the others are FastAPI's."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._apps = {route.path: route.app for route in routes if isinstance(route, JsonRoute) and route.takes_body}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        app = self._apps.get(scope["path"], self._app) if is_post else self._app
        await app(scope, receive, send)


def _says_json(scope: Scope, needs_type: bool) -> bool:
    """Whether the body's type is JSON's. A web page elsewhere can send other types, or none, and nobody is asked first."""
    kind, has_origin = b"", False
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
        elif name == b"origin":
            has_origin = True
    if not kind:
        return not (needs_type or has_origin)
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))
