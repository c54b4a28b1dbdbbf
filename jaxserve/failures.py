"""Failures: how many steps have failed of late, and when that is too many to go on. Knows no step."""

from __future__ import annotations

from collections import deque

IN_A_ROW = 2
LATELY = 32  # a failure that comes back with every other step would else go on for ever
STEPS = 1000  # that are lately


class Failures:
    """The record of an engine's failed steps.

    Attributes:
        in_a_row: failures since the last step that went well.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self._num_steps = 0
        self._failed_at: deque[int] = deque(maxlen=LATELY)

    def record_success(self) -> None:
        self.in_a_row = 0
        self._num_steps += 1

    def record_failure(self) -> str | None:
        """Why the engine cannot go on, if it cannot."""
        self.in_a_row += 1
        self._num_steps += 1
        self._failed_at.append(self._num_steps)
        if self.in_a_row >= IN_A_ROW:
            return f"{self.in_a_row} steps failed in a row"
        if len(self._failed_at) == LATELY and self._num_steps - self._failed_at[0] < STEPS:
            return f"{LATELY} of the last {STEPS:,} steps failed"
        return None
