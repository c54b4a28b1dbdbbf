"""Slots: the places in the batch, what each free one's page table still holds on the device, and which go on as copies of
others: a recurrent state lives in its request's slot. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence


class Slots:
    """Numbers from 0 on, each taken by at most one request."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._tables: list[list[int]] = [[] for _ in range(count)]
        self._fork_of: dict[int, int] = {}  # those not copied yet

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, pages: Sequence[int]) -> tuple[int, int]:
        """A free slot, and how many of these pages its table on the device begins with already."""
        slot = self._free.pop()
        table = self._tables[slot]
        same = (i for i, (a, b) in enumerate(zip(pages, table, strict=False)) if a != b)
        return slot, next(same, min(len(pages), len(table)))

    def give_back(self, slot: int, table: list[int]) -> None:
        """Frees a slot whose table on the device holds these pages."""
        self._free.append(slot)
        self._tables[slot] = table
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
