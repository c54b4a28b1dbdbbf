"""JSON and server-sent events as bytes. Plain dicts in: no validation here, as this is the stream's hot path."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

# ASCII only: U+2028, U+0085 and the like end a line for many clients' SSE parsers, and a lone surrogate echoed in an
# error text has no UTF-8 form.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode

DONE = b"data: [DONE]\n\n"
"""The event that ends every stream."""


class Json(Response):
    """A response of one JSON value."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content).encode("ascii")


def encode_event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data).encode("ascii") + b"\n\n"


def encode_named_event(data: dict[str, Any]) -> bytes:
    """One server-sent event whose name is its data's type, as the Responses API and Anthropic's have them."""
    return b"event: " + str(data["type"]).encode("ascii") + b"\n" + encode_event(data)


def encode_line(data: dict[str, Any]) -> bytes:
    """One line of a stream of JSON lines."""
    return _encode(data).encode("ascii") + b"\n"
