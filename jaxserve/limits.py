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
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_page_updates: int
    window: int | None = None


def common_window(specs: Sequence[AnyCacheSpec]) -> int | None:
    """How far back the layers that keep pages read at most: all share one page table, so a single one that reads on decides."""
    windows = [spec.window for spec in specs if not isinstance(spec, StateSpec)]
    found = [window for window in windows if window is not None]
    return max(found) if found and len(found) == len(windows) else None
