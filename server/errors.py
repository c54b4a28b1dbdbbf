"""Exceptions to HTTP: the only place that knows status codes and OpenAI's error body."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from jaxserve.errors import (
    EngineDeadError,
    InvalidRequestError,
    JaxserveError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
)
from jaxserve.server.wire import Json

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody reads it but the access log


class NotFoundError(RequestError):
    """What the request names is not there."""


class ModelNotFoundError(NotFoundError):
    """The request names a model that this server does not serve."""


class AuthenticationError(RequestError):
    """The request has no key, or a wrong one."""


class PermissionDeniedError(RequestError):
    """The request's key does not open this route."""


class RateLimitError(RequestError):
    """The client sends more than it may.

    Attributes:
        headers: when it may come back.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(retry_after_s)}


class BodyTooLargeError(RequestError):
    """The request's body is larger than the server takes."""


# exception -> status, OpenAI's "type", "code"; the closest class of the exception's own tree counts
_KINDS: dict[type[BaseException], tuple[int, str, str | None]] = {
    InvalidRequestError: (400, "invalid_request_error", None),
    PromptTooLongError: (400, "invalid_request_error", "context_length_exceeded"),
    NotFoundError: (404, "invalid_request_error", "not_found"),
    ModelNotFoundError: (404, "invalid_request_error", "model_not_found"),
    AuthenticationError: (401, "authentication_error", "invalid_api_key"),
    PermissionDeniedError: (403, "permission_error", "insufficient_permissions"),
    RateLimitError: (429, "rate_limit_error", "rate_limit_exceeded"),
    BodyTooLargeError: (413, "invalid_request_error", "request_too_large"),
    QueueFullError: (429, "rate_limit_error", "queue_full"),
    EngineDeadError: (503, "server_error", "engine_dead"),
    Exception: (500, "server_error", None),
}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}
_RETRY_AFTER_S = "1"
NO_JSON = "the body must be a JSON object, sent with the header Content-Type: application/json"
REJECTED = "rejected"  # in a request's state: the code of its error


Dialect = Literal["openai", "anthropic", "ollama"]
_DIALECTS: dict[str, Dialect] = {"/v1/messages": "anthropic", "/api/": "ollama"}  # by the beginning of the path
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def describe(error: BaseException, dialect: Dialect = "openai") -> tuple[int, dict[str, Any]]:
    """The status and the error body for an exception; the text of an unforeseen one stays in the log."""
    status, kind, code = _kind_of(error)
    message = str(error) if isinstance(error, JaxserveError) else "internal error; the server's log has the details"
    return status, error_body(status, message, kind, code, getattr(error, "param", None), dialect)


def _kind_of(error: BaseException) -> tuple[int, str, str | None]:
    return next(_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS)


def error_body(
    status: int, message: str, kind: str, code: str | None = None, param: str | None = None, dialect: Dialect = "openai"
) -> dict[str, Any]:
    """The error body that the clients of an API know."""
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}}
    if dialect == "ollama":
        return {"error": message}
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: BaseException, scope: Scope) -> Response:
    """The answer to a request that ended with an exception."""
    status, body = describe(error, _dialect_of(scope["path"]))
    scope.setdefault("state", {})[REJECTED] = _kind_of(error)[2]
    headers = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Json(body, status, headers | getattr(error, "headers", {}))


def describe_limit(status: int, message: str) -> tuple[bytes, bytes]:
    """The status line and the body for what has not become a request."""
    kind = "server_error" if status == 503 else "invalid_request_error"
    line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode("ascii")
    code = "request_timeout" if status == 408 else None
    return line, bytes(Json(error_body(status, message, kind, code)).body)


def _dialect_of(path: str) -> Dialect:
    return next((dialect for prefix, dialect in _DIALECTS.items() if path.startswith(prefix)), "openai")


def add_error_handlers(app: FastAPI) -> None:
    """Registers one handler for each family of exceptions."""
    for kind in (JaxserveError, RequestValidationError, ValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)


def answer_to(error: Exception, scope: Scope) -> Response:
    """The answer to a request whose handling raised something, whatever it is."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(error, RequestValidationError | ValidationError):
        error = explain_validation(error)
    elif not isinstance(error, JaxserveError):
        log.error("a request failed", exc_info=error)
    return error_response(error, scope)


async def _on_error(request: Request, error: Exception) -> Response:
    return answer_to(error, request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    message = f"{error.detail}: {request.method} {request.scope['path']}"
    code, dialect = _HTTP_CODES.get(error.status_code), _dialect_of(request.scope["path"])
    body = error_body(error.status_code, message, "invalid_request_error", code, dialect=dialect)
    return Json(body, error.status_code, error.headers)


def explain_validation(error: RequestValidationError | ValidationError) -> InvalidRequestError:
    """What is wrong with a body that does not fit: the client's own, or the chat that was made of it."""
    first: dict[str, Any] = dict(error.errors()[0])
    if isinstance(error, RequestValidationError):
        first["loc"] = first["loc"][1:]  # without "body"
    param, message = _explain(first)
    return InvalidRequestError(message, param=param)


def _explain(error: Mapping[str, Any]) -> tuple[str | None, str]:
    """(field at fault, text) for one of pydantic's errors."""
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {context.get('error', error['msg'])}"
    own_param = (context["param"],) if "param" in context else ()
    param = _path((*error["loc"], *own_param))
    if not param:
        return None, NO_JSON
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
