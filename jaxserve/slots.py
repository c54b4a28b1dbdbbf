"""Slots: the places in the batch, and what each free one's page table still holds on the device. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence


class Slots:
    """Numbers from 0 on, each taken by at most one request."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._tables: list[list[int]] = [[] for _ in range(count)]

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

    def forget_tables(self) -> None:
        """The device has lost its tables."""
        self._tables = [[] for _ in self._tables]

    def check_integrity(self, taken: Sequence[int]) -> None:
        """Raises AssertionError where these are not just the slots that are not free."""
        assert sorted([*taken, *self._free]) == list(range(len(self._tables))), "a slot is lost or used twice"
