"""Admission: counts what a server has taken in, and refuses more than its limits. Knows no engine and no lock."""

from __future__ import annotations

from jaxserve.config import SchedulerConfig
from jaxserve.errors import QueueFullError


class Admission:
    """The requests in flight, from their submission to their end.

    Both limits are soft by one request: a server with nothing to do takes any.
    """

    def __init__(self, limits: SchedulerConfig) -> None:
        self._max_reqs = limits.max_num_queued_reqs
        self._max_tokens = limits.max_num_queued_tokens
        self._samples: dict[str, int] = {}
        self._waiting_tokens: dict[str, int] = {}

    def enter(self, request_id: str, num_samples: int, num_prompt_tokens: int) -> None:
        """Counts a request in.

        Raises:
            QueueFullError: a limit is reached; nothing is counted then.
        """
        if self._max_reqs is not None:
            in_flight = sum(self._samples.values())
            if in_flight and in_flight + num_samples > self._max_reqs:
                raise QueueFullError(
                    f"{in_flight} requests are in flight, and the server takes {self._max_reqs}; try again later"
                )
        if self._max_tokens is not None and (waiting := sum(self._waiting_tokens.values())) >= self._max_tokens:
            raise QueueFullError(f"{waiting:,} prompt tokens wait, and the server takes {self._max_tokens:,}; try again later")
        self._samples[request_id] = num_samples
        self._waiting_tokens[request_id] = num_prompt_tokens

    def answer(self, request_id: str) -> None:
        """A request has its first token: its prompt waits no more."""
        self._waiting_tokens.pop(request_id, None)

    def leave(self, request_id: str) -> None:
        """A request has ended, or is unknown."""
        self._samples.pop(request_id, None)
        self._waiting_tokens.pop(request_id, None)
