"""StepRunner: what the engine needs of whatever runs its steps; a device (runner.py), or a model of one (simulation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.request import Request
from jaxserve.step_plan import SampleRow, StepPlan
from jaxserve.step_results import StepResults


@dataclass(frozen=True, slots=True)
class InFlight:
    """A dispatched step whose results are on their way to the host.

    Attributes:
        rows: whose the results are that follow those of plan.decodes.
        outputs: by the names of StepResults.
        weight_version: of the weights that it runs with.
    """

    plan: StepPlan
    rows: list[SampleRow]
    outputs: dict[str, Any]
    weight_version: int = 0


class StepRunner(Protocol):
    """Runs steps, strictly in the order in which they are dispatched."""

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Sends one step on its way; returns before it has run."""
        ...

    def is_ready(self, step: InFlight) -> bool:
        """Whether `collect` would not wait."""
        ...

    def collect(self, step: InFlight) -> StepResults:
        """Waits for a step's results."""
        ...

    def set_shaping(self, request: Request) -> None:
        """Takes note that the request's penalties, biases or bans have changed."""
        ...

    def reset(self) -> None:
        """Starts anew after a step that failed; what was in the pool is lost."""
        ...

    def shutdown(self) -> None:
        """Frees the device memory."""
        ...
