"""StepPlan: what one step does, as the scheduler decides it and the runner packs it."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.request import Request


@dataclass(slots=True)
class PlanRow:
    """One request's share of a step.

    Attributes:
        start: position of the first token computed.
        samples: the requests that get a token sampled from the row's last logits: the request itself, and those that fork
            from it; none while the prompt is not computed to its end.
        new_pages: index of the first page that the device's table does not know yet.
        num_targets: how many of the row's tokens are prompt tokens whose next token's log probability is wanted.
        placed: requests that have just got their slot.
    """

    request: Request
    start: int
    num_tokens: int
    samples: list[Request]
    new_pages: int
    num_targets: int
    placed: list[Request]


@dataclass(slots=True)
class StepPlan:
    """What one step does. Rows with one token come first.

    Attributes:
        page_copies: (from, to) pages to copy before the step.
    """

    rows: list[PlanRow] = field(default_factory=list)
    num_tokens: int = 0
    num_samples: int = 0
    num_page_updates: int = 0
    page_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """Whether every row has exactly one token."""
        return self.num_tokens == len(self.rows)
