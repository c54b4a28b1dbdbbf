"""How a layer answers a request that does not reach the routes."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from jaxserve.errors import JaxserveError
from jaxserve.server.errors import error_response


async def refuse(error: JaxserveError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with an error and closes the connection, since nobody has read the body."""
    response = error_response(error, scope)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
