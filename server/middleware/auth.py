"""Authentication: no request passes without a key, where there are keys. Looks at the path that routes are found by."""

from __future__ import annotations

import hashlib

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.errors import AuthenticationError, PermissionDeniedError
from jaxserve.server.keys import ApiKeys, Key
from jaxserve.server.middleware.refuse import refuse
from jaxserve.server.serving import OWNER, SALT

OPEN = frozenset({"/health", "/ping", "/"})  # probes have no keys; the page is a file that asks for one
ADMIN = frozenset({"/metrics", "/start_profile", "/stop_profile"})


class Authentication:
    """Takes a key from `Authorization: Bearer KEY`, or from `x-api-key`, as Anthropic's clients send it."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, isolate_prefix_cache: bool) -> None:
        self._app = app
        self._keys = keys
        self._isolates = isolate_prefix_cache

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            key = self._key_of(scope)
            if key is None:
                error = AuthenticationError(
                    "a valid API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
                )
                await refuse(error, scope, receive, send)
                return
            if scope["path"] in ADMIN and not key.is_admin:
                await refuse(PermissionDeniedError(f"{scope['path']} needs an admin key"), scope, receive, send)
                return
            state = scope.setdefault("state", {})
            state[OWNER] = key.name
            if self._isolates:
                state[SALT] = hashlib.sha256(key.digest).hexdigest()
        await self._app(scope, receive, send)

    def _key_of(self, scope: Scope) -> Key | None:
        sent = [value for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
        if not sent or len(sent) > 2:
            return None
        keys = {self._keys.find(_strip_scheme(value)) for value in sent}
        return keys.pop() if len(keys) == 1 else None  # both headers may come, but not with different keys


def _strip_scheme(value: bytes) -> str:
    text = value.decode("latin-1").strip()
    scheme, _, rest = text.partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else text
