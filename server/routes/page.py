"""GET /: the chat page, one file that loads nothing from anywhere else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_router() -> APIRouter:
    router = APIRouter()
    page = (files("jaxserve.server") / "static" / "index.html").read_bytes()
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @router.get("/")
    async def chat_page() -> Response:
        """The chat page."""
        return Response(page, media_type="text/html", headers=headers)

    return router
