"""Limits: what one step and the engine can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.models.interface import AnyCacheSpec, StateSpec


@dataclass(frozen=True)
class Limits:
    """What one step and the engine can hold.

    Attributes:
        max_page_updates: changes of page tables that a plan can carry; at least one whole table.
        window: tokens that a token sees at most, itself included, in whichever layer; None for all.
        token_sizes: tokens that the programs of mixed steps are compiled for, ascending; none if every number costs its own.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_page_updates: int
    window: int | None = None
    token_sizes: tuple[int, ...] = ()

    def token_budget(self, least: int, wanted: int) -> int:
        """Tokens that a step should have at most: as many as a program has that they fill by half.

        A step just past a program's size would pay for the next one, mostly for padding; what is over waits for the next step.

        Args:
            least: tokens that must run.
            wanted: tokens that could.
        """
        smaller = 0
        for size in self.token_sizes:
            if wanted <= size:
                return smaller if 2 * wanted < size and smaller >= max(least, 1) else size
            smaller = size
        return self.max_num_batched_tokens


def common_window(specs: Sequence[AnyCacheSpec]) -> int | None:
    """How far back the layers that keep pages read at most: all share one page table, so a single one that reads on decides."""
    windows = [spec.window for spec in specs if not isinstance(spec, StateSpec)]
    found = [window for window in windows if window is not None]
    return max(found) if found and len(found) == len(windows) else None
