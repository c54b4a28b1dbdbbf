"""Limits: what one step and the engine can hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one step and the engine can hold.

    Attributes:
        max_page_updates: changes of page tables that a plan can carry; at least one whole table.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_page_updates: int
