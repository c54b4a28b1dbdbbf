"""The sizes that programs are compiled for: a sum of buckets, never a product. Knows no program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jaxserve.models.cache_layout import Reach
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import ALIGN
from jaxserve.plan import PlanShape

GPU_MIDDLE_TOKENS = 1024  # of a mixed step
REPEATED_ROWS = 64  # of programs of several steps at most: more rows take a GPU longer than the host, and whoever arrives waits


@dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for, each ascending.

    Attributes:
        decode: requests of a step whose requests all have one token.
        tokens: tokens of any other step, with requests at their maximum.
        samples: rows that are sampled.
        block: rows that the rarer ways of sampling take at a time, whatever the step's number.
        pages_per_slot: entries of a column of a request's page table.
        column_pages: pages that a request holds at most in each of the columns.
        num_steps: decode steps of those programs that run several; 1 if there are none.
        align: the first row with more than one token begins at a multiple of it among a step's tokens, where there is room.
    """

    decode: tuple[int, ...]
    tokens: tuple[int, ...]
    samples: tuple[int, ...]
    block: int
    pages_per_slot: int
    page_size: int
    column_pages: tuple[int, ...]
    num_steps: int = 1
    align: int = 1

    @property
    def num_tables(self) -> int:
        """Columns of a request's page table."""
        return len(self.column_pages)

    @property
    def max_num_seqs(self) -> int:
        return self.decode[-1]

    @cached_property
    def decode_shapes(self) -> dict[int, PlanShape]:
        """The plans of the decode programs, by requests: at most one new page a request and column."""
        return {n: PlanShape(n, n, _at_least(self.samples, n), n * self.num_tables) for n in self.decode}

    @cached_property
    def repeated_shapes(self) -> dict[int, PlanShape]:
        """The plans of programs that run several decode steps, by requests. No request needs two pages for as few steps."""
        shapes = {n: s for n, s in self.decode_shapes.items() if n <= REPEATED_ROWS and self.num_steps > 1}
        return {n: replace(shape, num_steps=self.num_steps) for n, shape in shapes.items()}

    @cached_property
    def mixed_shapes(self) -> dict[int, PlanShape]:
        """The plans of the mixed programs, by tokens: one whole table, and room for prefix hits of many pages and few tokens."""
        whole, others = self.max_num_seqs * self.num_tables + sum(self.column_pages), self.num_tables - 1
        updates = {n: whole + n + others * (n // self.page_size) for n in self.tokens}
        return {n: PlanShape(n, self.max_num_seqs, self.max_num_seqs, updates[n]) for n in self.tokens}

    @property
    def shapes(self) -> list[PlanShape]:
        """Every forward program's plan, the largest first."""
        shapes = self.decode_shapes, self.repeated_shapes, self.mixed_shapes
        return [shape for some in reversed(shapes) for shape in reversed(some.values())]

    @property
    def max_page_updates(self) -> int:
        """Changes of page tables that the largest plan carries."""
        return self.shapes[0].num_page_updates

    @cached_property
    def plan_size(self) -> int:
        """Length of a packed plan: all programs read from one buffer."""
        return max(shape.size for shape in self.shapes)

    def choose(
        self, num_rows: int, num_tokens: int, num_samples: int, num_page_updates: int, *, is_repeated: bool = False
    ) -> PlanShape:
        """The smallest plan that holds a step, or as many decode steps as a program has."""
        if is_repeated:
            return self.repeated_shapes[_at_least(self.decode, num_rows)]
        if num_rows == num_tokens:
            shape = self.decode_shapes[_at_least(self.decode, num_rows)]
            if num_samples <= shape.num_samples and num_page_updates <= shape.num_page_updates:
                return shape
        fitting = (s for s in self.mixed_shapes.values() if num_tokens <= s.num_tokens and num_page_updates <= s.num_page_updates)
        return next(fitting)

    def gap(self, num_single: int, num_rows: int, num_tokens: int, shape: PlanShape) -> int:
        """Rows of one token that are nobody's, behind the `num_single` that are somebody's; none where the plan has no room."""
        gap = -num_single % self.align
        has_room = num_rows + gap <= shape.num_rows and num_tokens + gap <= shape.num_tokens
        return gap if has_room and num_single < num_rows else 0


def choose_buckets(
    platform: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    pages_per_slot: int,
    page_size: int,
    reaches: Sequence[Reach] = (Reach(),),
    num_steps: int = 1,
) -> Buckets:
    """Buckets for the platform. Requests are a factor of 4 apart, since a padded decode row costs little beside the weights' traffic."""
    # On a GPU a row alone is no faster than 16: XLA's kernels for vectors are slower than its matrix products.
    decode = _geometric(max_num_seqs, 1 if platform == "cpu" else min(16, max_num_seqs), 4)
    samples = {decode[0], max_num_seqs} if platform == "cpu" else {decode[0], *decode[-2:]}
    return Buckets(
        decode=decode,
        tokens=_token_sizes(platform, max_num_seqs, max_num_batched_tokens),
        samples=tuple(sorted(samples)),
        block=1 if platform == "cpu" else decode[-2:][0],
        pages_per_slot=pages_per_slot,
        page_size=page_size,
        column_pages=tuple(r.max_pages(pages_per_slot * page_size, page_size, max_num_batched_tokens) for r in reaches),
        num_steps=num_steps,
        align=ALIGN if platform == "gpu" else 1,
    )


def _token_sizes(platform: str, max_num_seqs: int, largest: int) -> tuple[int, ...]:
    """Tokens of mixed steps: three sizes at most."""
    if platform != "gpu":
        smallest = max(32 if platform == "cpu" else 256, max_num_seqs + 1)  # as many tokens as requests would mean decode
        return _geometric(largest, smallest, 4)[-3:]
    # Best of some in the simulator, for all requests at once and as they come: all requests' tokens and few of prompts; about
    # where arithmetic begins to take longer than reading the weights; all.
    few = (max_num_seqs // 128 + 1) * 128
    return tuple(size for size in dict.fromkeys((few, GPU_MIDDLE_TOKENS)) if max_num_seqs < size <= largest // 2) + (largest,)


def _geometric(largest: int, smallest: int, factor: int) -> tuple[int, ...]:
    sizes = {largest}
    size = largest // factor
    while size >= smallest:
        sizes.add(size)
        size //= factor
    return tuple(sorted(sizes | ({smallest} if smallest == 1 else set())))


def _at_least(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)
