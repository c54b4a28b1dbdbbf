"""CacheLayout: which array and which of a request's page tables each layer's pages are in. Knows shapes, no arrays and no requests.

Layers that read equally far back make up groups of one size, each with a page table of its own. Array i serves the i-th layer
of every group, and a page of the pool is the same place in all arrays: so whichever group takes it, it has the same bytes, and
one list of free pages serves all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.models.cache_spec import AnyCacheSpec, CacheSpec, StateSpec

MAX_TABLES = 8  # for each, a request costs the host a page at a time, and the device a table


@dataclass(frozen=True)
class Reach:
    """How far back the layers of a page table read.

    Attributes:
        window: tokens that a token sees at most, itself included; None for all.
        is_chunked: it sees those of its own chunk of so many positions; else the last ones.
    """

    window: int | None = None
    is_chunked: bool = False

    def first_read(self, position: int) -> int:
        """The first position that the token at `position`, or any behind it, reads."""
        if self.window is None:
            return 0
        return position // self.window * self.window if self.is_chunked else max(position + 1 - self.window, 0)

    def max_pages(self, num_tokens: int, page_size: int, max_chunk: int) -> int:
        """Pages that a request of so many tokens holds at most, if a step computes no more than max_chunk of them."""
        pages = -(-num_tokens // page_size)
        return pages if self.window is None else min(pages, -(-(self.window + max_chunk) // page_size) + 1)

    def __str__(self) -> str:
        return "all tokens" if self.window is None else f"{'chunks' if self.is_chunked else 'windows'} of {self.window:,} tokens"


@dataclass(frozen=True)
class CachePlace:
    """Where one of a model's cache specs is.

    Attributes:
        array: its number among the arrays.
        table: number of the page table that leads there; None for a state, which is in its request's slot.
    """

    array: int
    table: int | None


@dataclass(frozen=True)
class CacheLayout:
    """Which array and page table each of a model's caches is in.

    Attributes:
        places: one for each of the model's cache specs.
        arrays: what each array holds; one that serves several layers is as any of them says.
        reaches: of the page tables.
    """

    places: tuple[CachePlace, ...]
    arrays: tuple[AnyCacheSpec, ...]
    reaches: tuple[Reach, ...]

    @property
    def num_tables(self) -> int:
        return len(self.reaches)

    def __str__(self) -> str:
        size = sum(isinstance(spec, CacheSpec) for spec in self.arrays)
        counts = Counter(map(str, self.reaches))
        return f"{self.num_tables} a request, each of up to {size} layers: " + ", ".join(f"{n} of {s}" for s, n in counts.items())


def one_table(specs: Sequence[AnyCacheSpec]) -> CacheLayout:
    """Every layer has an array of its own, and all share one page table: it reaches as far back as any of them reads."""
    places = (CachePlace(i, None if isinstance(spec, StateSpec) else 0) for i, spec in enumerate(specs))
    return CacheLayout(tuple(places), tuple(specs), (_widest({_reach(s) for s in specs if isinstance(s, CacheSpec)}),))


def group_layers(specs: Sequence[AnyCacheSpec], max_tokens: int, max_tables: int = MAX_TABLES) -> CacheLayout:
    """Groups the layers by how far back they read; one table where that saves nothing, or where their pages differ in shape.

    Args:
        max_tokens: of a request; a window that holds them all is none.
    """
    layers: dict[Reach, list[int]] = {}
    for i, spec in enumerate(specs):
        if isinstance(spec, CacheSpec):
            reach = _reach(spec)
            layers.setdefault(Reach() if (reach.window or 0) >= max_tokens else reach, []).append(i)
    shapes = {(s.num_kv_heads, s.head_dim, s.is_sharded) for s in specs if isinstance(s, CacheSpec)}
    size = _group_size([len(found) for found in layers.values()], max_tables)
    if len(layers) < 2 or len(shapes) > 1 or size is None:
        return one_table(specs)
    groups = [(reach, found[at : at + size]) for reach, found in layers.items() for at in range(0, len(found), size)]
    places = {layer: CachePlace(i, table) for table, (_, group) in enumerate(groups) for i, layer in enumerate(group)}
    states = [i for i, spec in enumerate(specs) if isinstance(spec, StateSpec)]
    places |= {layer: CachePlace(size + i, None) for i, layer in enumerate(states)}
    pages = next(spec for spec in specs if isinstance(spec, CacheSpec))
    arrays = (pages,) * size + tuple(specs[i] for i in states)
    return CacheLayout(tuple(places[i] for i in range(len(specs))), arrays, tuple(reach for reach, _ in groups))


def _group_size(counts: Sequence[int], max_tables: int) -> int | None:
    """Layers of a group: so that none of these kinds of layers pays much for places that its last group leaves empty."""

    def cost(size: int) -> tuple[float, int]:
        return max(-(-n // size) * size / n for n in counts), -size

    sizes = range(1, max(counts, default=0) + 1)
    return min((s for s in sizes if sum(-(-n // s) for n in counts) <= max_tables), key=cost, default=None)


def _reach(spec: CacheSpec) -> Reach:
    return Reach(spec.window, spec.kind == "chunked")


def _widest(reaches: set[Reach]) -> Reach:
    windows = [reach.window for reach in reaches if reach.window is not None]
    if not windows or len(windows) < len(reaches):
        return Reach()
    return Reach(max(windows)) if len(reaches) > 1 else next(iter(reaches))


def table_of(places: tuple[CachePlace, ...]) -> int:
    """The page table of a layer whose caches have these places; 0 if it has no pages."""
    tables = {place.table for place in places if place.table is not None}
    assert len(tables) < 2, f"a layer's pages are in one table; got {places}"
    return tables.pop() if tables else 0
