"""Slots: the places in the batch, what each free one's page tables still hold on the device, and which go on as copies of
others: a recurrent state lives in its request's slot. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.page_table import PageTable


class Slots:
    """Numbers from 0 on, each taken by at most one request."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._tables: list[list[list[int]]] = [[] for _ in range(count)]  # of each slot, by columns
        self._fork_of: dict[int, int] = {}  # those not copied yet

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, table: PageTable) -> int:
        """A free slot; notes how much of the table the device has there already."""
        slot = self._free.pop()
        for column, there in zip(table.columns, self._tables[slot], strict=False):
            entries = range(column.num_passed, min(len(column.pages), len(there)))
            differs = (i for i in entries if column.pages[i] != there[i])
            column.num_sent = next(differs, max(entries.stop, column.num_passed))
        return slot

    def give_back(self, slot: int, table: PageTable) -> None:
        """Frees a slot with what the device has of the table."""
        self._free.append(slot)
        self._tables[slot] = [column.pages[: column.num_sent] for column in table.columns]
        self._fork_of.pop(slot, None)

    def fork(self, source: int, target: int) -> None:
        """What the request in slot `source` has come to is where the one in slot `target` goes on from."""
        self._fork_of[target] = self._fork_of.get(source, source)

    def take_forks(self) -> list[tuple[int, int]]:
        """The (from, to) slots to copy, all at once, before the step that is planned next."""
        forks = [(source, target) for target, source in self._fork_of.items()]
        self._fork_of.clear()
        return forks

    def put_back_forks(self, forks: list[tuple[int, int]]) -> None:
        """Nothing was copied: there was no step."""
        self._fork_of = {target: source for source, target in forks} | self._fork_of

    def forget_tables(self) -> None:
        """The device has lost its tables."""
        self._tables = [[] for _ in self._tables]

    def check_integrity(self, taken: Sequence[int]) -> None:
        """Raises AssertionError where these are not just the slots that are not free."""
        assert sorted([*taken, *self._free]) == list(range(len(self._tables))), "a slot is lost or used twice"
