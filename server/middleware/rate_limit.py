"""RateLimit: how many requests a minute one client may send. Comes after the check of its key, which names the client."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.errors import RateLimitError
from jaxserve.server.middleware.auth import OPEN
from jaxserve.server.middleware.refuse import refuse
from jaxserve.server.serving import OWNER

MAX_CLIENTS = 10_000  # of whom it is remembered what they have sent; the longest silent are forgotten first


class TokenBuckets:
    """A bucket for each client: full at first, refilled steadily, emptied by one a request."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (level, when)

    def take(self, client: str) -> float:
        """Takes one, and returns 0; where there is none, returns the seconds until there will be."""
        now = self._clock()
        level, when = self._buckets.pop(client, (self._size, now))
        level = min(self._size, level + (now - when) * self._per_second)
        wait_s = 0.0 if level >= 1 else (1 - level) / self._per_second
        self._buckets[client] = (level - (wait_s == 0), now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return wait_s


class RateLimit:
    """Answers 429 with Retry-After to a client that sends too many requests."""

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self._app = app
        self._per_minute = per_minute
        self._buckets = TokenBuckets(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            owner = scope.get("state", {}).get(OWNER)
            address = scope["client"][0] if scope.get("client") else ""
            wait_s = self._buckets.take(f"key {owner}" if owner is not None else f"address {address}")
            if wait_s:
                error = RateLimitError(f"{self._per_minute} requests a minute are allowed; try again later", math.ceil(wait_s))
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)
