"""Limits: what one step and the engine can hold."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Limits:
    """What one step and the engine can hold.

    Attributes:
        max_page_updates: changes of page tables that a plan can carry; at least one whole table.
        token_sizes: tokens that the programs of mixed steps are compiled for, ascending; none if every number costs its own.
        num_steps: Buckets.num_steps.
        repeated_rows: requests that programs of several steps hold.
        repeated_mode_rank: of the last of sampler.Mode that they know.
        align: Buckets.align.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_page_updates: int
    _: KW_ONLY
    token_sizes: tuple[int, ...] = ()
    num_steps: int = 1
    repeated_rows: int = 0
    repeated_mode_rank: int = 0
    align: int = 1

    def token_budget(self, least: int, wanted: int) -> int:
        """Tokens that a step should have at most: as many as a program has that they fill by three quarters.

        A step just past a program's size would pay for the next one, mostly for padding; what is over waits for the next step.

        Args:
            least: tokens that must run.
            wanted: tokens that could.
        """
        smaller = 0
        for size in self.token_sizes:
            if wanted <= size:
                return smaller if 4 * wanted < 3 * size and smaller >= max(least, 1) else size
            smaller = size
        return self.max_num_batched_tokens
