"""Exceptions to HTTP: the only place that knows status codes and OpenAI's error body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from jaxserve.errors import (
    EngineDeadError,
    InvalidRequestError,
    JaxserveError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
)
from jaxserve.server.wire import Json

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody reads it but the access log


class ModelNotFoundError(RequestError):
    """The request names a model that this server does not serve."""


# exception -> status, OpenAI's "type", "code"; the closest class of the exception's own tree counts
_KINDS: dict[type[BaseException], tuple[int, str, str | None]] = {
    InvalidRequestError: (400, "invalid_request_error", None),
    PromptTooLongError: (400, "invalid_request_error", "context_length_exceeded"),
    ModelNotFoundError: (404, "invalid_request_error", "model_not_found"),
    QueueFullError: (429, "rate_limit_error", "queue_full"),
    EngineDeadError: (503, "server_error", "engine_dead"),
    Exception: (500, "server_error", None),
}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_RETRY_AFTER_S = "1"


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the OpenAI error body for an exception; the text of an unforeseen one stays in the log."""
    status, kind, code = next(_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS)
    message = str(error) if isinstance(error, JaxserveError) else "internal error; the server's log has the details"
    return status, error_body(message, kind, code, getattr(error, "param", None))


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def add_error_handlers(app: FastAPI) -> None:
    """Registers one handler for each family of exceptions."""
    app.add_exception_handler(JaxserveError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_error(_: Request, error: Exception) -> Response:
    status, body = describe(error)
    return Json(body, status, {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else None)


async def _on_invalid_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    param, message = _explain(error.errors()[0])
    return Json(error_body(message, "invalid_request_error", param=param), 400)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.scope['path']}"
    body = error_body(message, "invalid_request_error", _HTTP_CODES.get(error.status_code))
    return Json(body, error.status_code, error.headers)


async def _on_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _explain(error: Mapping[str, Any]) -> tuple[str | None, str]:
    """(field at fault, text) for one of pydantic's errors."""
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {context.get('error', error['msg'])}"
    own_param = (context["param"],) if "param" in context else ()
    param = _path((*error["loc"][1:], *own_param))
    if not param:
        return None, "the body must be a JSON object, sent with the header Content-Type: application/json"
    if own_param:  # a whole sentence of protocol.py's
        return param, error["msg"]
    if error["type"] == "missing":
        return param, f"{param} is required"
    got = error.get("input")
    came = f"; got {got!r}" if isinstance(got, str | int | float | bool) and len(repr(got)) <= 80 else ""
    return param, f"{param}: {error['msg'].replace('Input should be', 'must be')}{came}"


def _path(loc: tuple[str | int, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    return "".join(parts).removeprefix(".")
