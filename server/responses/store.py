"""ResponseStore: the responses that clients may come back to, in memory, the oldest forgotten first. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from jaxserve.server.responses.protocol import Messages


@dataclass
class StoredResponse:
    """One response, finished or in the making.

    Attributes:
        owner: whose it is; nobody else can see it.
        body: the response as it is now.
        messages: the conversation so far: what a later request goes on with.
        task: makes it in the background.
    """

    owner: str
    body: dict[str, Any]
    messages: Messages = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    @property
    def num_characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


class ResponseStore:
    """At most so many responses with so many characters together. One that is in the making is forgotten like the others."""

    def __init__(self, max_responses: int, max_characters: int) -> None:
        self._max_responses = max_responses
        self._max_characters = max_characters
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, response: StoredResponse) -> None:
        """Keeps a response, or what has become of it."""
        name = response.body["id"]
        self._responses[name] = response
        self._responses.move_to_end(name)
        self._sizes[name] = response.num_characters
        while self._responses and (len(self._responses) > self._max_responses or self._num_characters > self._max_characters):
            self._drop(next(iter(self._responses)))

    def get(self, name: str, owner: str) -> StoredResponse | None:
        """The response of this name, if it is the owner's."""
        found = self._responses.get(name)
        return found if found is not None and found.owner == owner else None

    def delete(self, name: str, owner: str) -> bool:
        """Forgets a response, and stops it if it is in the making; False where there is none."""
        if self.get(name, owner) is None:
            return False
        self._drop(name)
        return True

    def close(self) -> None:
        """Stops what is in the making."""
        for name in list(self._responses):
            self._drop(name)

    @property
    def _num_characters(self) -> int:
        return sum(self._sizes.values())

    def _drop(self, name: str) -> None:
        dropped = self._responses.pop(name)
        del self._sizes[name]
        if dropped.task is not None:
            dropped.task.cancel()
