"""StepPlan: what one step does, as the scheduler decides it and the runner packs it."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.plan import NO_TARGET
from jaxserve.request import Request


@dataclass(slots=True)
class PlanRow:
    """One request's share of a step.

    Attributes:
        start: position of the first token computed.
        samples: the requests that get a token sampled from the row's last logits: the request itself, and those that fork
            from it; none while the prompt is not computed to its end.
        new_entries: of its page table, by columns: those that the device does not know yet.
        num_targets: how many of the row's tokens are prompt tokens whose next token's log probability is wanted.
    """

    request: Request
    start: int
    num_tokens: int
    samples: list[Request]
    new_entries: list[range]
    num_targets: int


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Whose a row of logits is.

    Attributes:
        position: of the token that the row gives.
        target: a prompt token whose log probability is asked; NO_TARGET where the row is sampled.
    """

    request: Request
    position: int
    target: int = NO_TARGET


@dataclass(slots=True)
class StepPlan:
    """What one step does. On the device `decodes` come first, then the rows with one token, then the others.

    Attributes:
        decodes: requests that just go on: each computes its newest token, and gets the next one sampled.
        ahead: those of `decodes` that go on alone in the next step, of these those in the one after it, and so on: as many more
            steps as the program runs, with nothing to decide in between.
        grown: those of them that have got one more page (in each column of their tables).
        rows: all other requests of the step.
        placed: requests that have just got their slot.
        token_budget: what num_tokens may come to.
        align: a chunk that does not end its prompt ends at a multiple of it, and for fewer tokens no request is started.
        page_copies: (from, to) pages to copy before the step.
        forks: (from, to) slots: before the step, the second goes on from where the first is; all at once.
    """

    decodes: list[Request] = field(default_factory=list)
    ahead: list[list[Request]] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)
    rows: list[PlanRow] = field(default_factory=list)
    placed: list[Request] = field(default_factory=list)
    num_tokens: int = 0
    token_budget: int = 0
    align: int = 1
    num_samples: int = 0
    num_page_updates: int = 0
    page_copies: list[tuple[int, int]] = field(default_factory=list)
    forks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Requests in the step."""
        return len(self.decodes) + len(self.rows)

    def places(self, requests: list[Request]) -> slice | list[int]:
        """Where in `decodes` requests of `ahead` stand."""
        if len(requests) == len(self.decodes):
            return slice(len(requests))
        places = {request: place for place, request in enumerate(self.decodes)}
        return [places[request] for request in requests]

    def sample_rows(self) -> list[SampleRow]:
        """Whose the rows of logits are that follow those of `decodes`, in order."""
        found = []
        for row in self.rows:
            for position in range(row.start + 1, row.start + 1 + row.num_targets):
                found.append(SampleRow(row.request, position, row.request.token_ids[position]))
            found += [SampleRow(request, row.start + row.num_tokens) for request in row.samples]
        return found

    def place(self, request: Request) -> None:
        """Notes that the request has just got its slot."""
        self.placed.append(request)
        request.is_placed = True

    def sample(self, row: PlanRow, request: Request) -> None:
        """A token is to be sampled for the request, from the row's last logits."""
        row.samples.append(request)
        self.num_samples += 1
        request.num_in_flight += 1

    def drop(self, request: Request) -> None:
        """Takes out a request that is preempted after all, and what is to be sampled for it."""
        if request in self.placed:
            self.placed.remove(request)
        if request in self.decodes:
            self.decodes.remove(request)
            self.num_tokens -= 1
            request.num_computed -= 1
            self._unsample(request)
        if request in self.grown:
            self.grown.remove(request)
            self._unsend(request, request.table.last_entries)
        for row in list(self.rows):
            if request in row.samples:
                row.samples.remove(request)
                self._unsample(request)
            if row.request is request:
                assert not row.samples, "a request is preempted before those that forked from it"
                self.rows.remove(row)
                self.num_tokens -= row.num_tokens
                self.num_samples -= row.num_targets
                self._unsend(request, row.new_entries)
                request.num_computed = row.start

    def _unsend(self, request: Request, entries: list[range]) -> None:
        self.num_page_updates -= sum(map(len, entries))
        request.table.unsend(entries)

    def _unsample(self, request: Request) -> None:
        self.num_samples -= 1
        request.num_in_flight -= 1
