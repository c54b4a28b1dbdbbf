"""Page tables of several groups under random use, on a pool whose pages remember what was written to them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kv_pages import KvPages
from jaxserve.models.cache_layout import Reach
from jaxserve.page_keys import page_keys, root_key
from jaxserve.page_pool import PagePool
from jaxserve.page_table import PageTable
from jaxserve.prefix_cache import PrefixCache

PAGE, MAX_CHUNK = 4, 10
TEXTS = [[0] * 40, [0] * 13 + [1] * 27]  # alike for three pages


class Writer:
    """Computes texts as a device would: each token is written for each group, and reads what its group sees."""

    def __init__(self, num_pages: int, reaches: tuple[Reach, ...]) -> None:
        pool = PagePool(num_pages)
        self.reaches = reaches
        self.pages = KvPages(pool, PAGE, PrefixCache(pool, len(reaches)), reaches, MAX_CHUNK)
        self.written: dict[tuple[int, int], tuple[int, list[int]]] = {}  # (page, offset) -> group, the text up to there
        self.running: list[tuple[list[int], PageTable, int]] = []  # text, table, tokens computed

    def start(self, which: int, num_tokens: int) -> None:
        text = TEXTS[which % 2]
        table = self.pages.find(page_keys(root_key(""), text, PAGE)[: (num_tokens - 1) // PAGE])
        if self.pages.can_start(table, num_tokens):
            self.pages.share(table)
            self.running.append((text[:num_tokens], table, table.num_cached * PAGE))
            assert self.compute(len(self.running) - 1, MAX_CHUNK), "what can start has its first pages"

    def compute(self, which: int, count: int) -> bool:
        """Some more tokens of a request, which grows where it has none left; it is dropped when there are no pages."""
        if not self.running:
            return False
        text, table, start = self.running.pop(which % len(self.running))
        text = text if start < len(text) else [*text, 7]
        stop, copies = min(start + min(count, MAX_CHUNK), len(text)), []
        if self.pages.has_passed(table, start):
            self.pages.release_passed(table, start)
        if not self.pages.reserve(table, start, stop, len(text), copies):
            self.pages.free(table)
            return False
        for source, target in copies:
            self.written |= {(target, i): self.written[source, i] for i in range(PAGE) if (source, i) in self.written}
        for group, column in enumerate(table.columns):
            for at in range(start, stop):
                assert self.pages.pool.holders(column.pages[at // PAGE]) == 1, "somebody else reads the page"
                self.written[column.pages[at // PAGE], at % PAGE] = group, text[: at + 1]
            for at in range(start, stop):
                self._read(group, at, text, table)
        self.pages.record(table, page_keys(root_key(""), text[:stop], PAGE))
        self.running.append((text, table, stop))
        return True

    def _read(self, group: int, at: int, text: list[int], table: PageTable) -> None:
        reach, column = self.reaches[group], table.columns[group]
        first = 0
        if reach.window is not None:
            first = at - at % reach.window if reach.is_chunked else max(at + 1 - reach.window, 0)
        for seen in range(first, at + 1):
            assert seen // PAGE >= column.num_passed
            assert self.written[column.pages[seen // PAGE], seen % PAGE] == (group, text[: seen + 1])

    def fork(self, which: int, _: int) -> None:
        computed_whole = [request for request in self.running if request[2] == len(request[0])]
        if computed_whole:
            text, table, computed = computed_whole[which % len(computed_whole)]
            child = table.forked()
            self.pages.share(child)
            self.running.append((list(text), child, computed))

    def free(self, which: int, _: int) -> None:
        if self.running:
            self.pages.free(self.running.pop(which % len(self.running))[1])


ACTIONS = st.tuples(
    st.sampled_from(["start", "compute", "compute", "compute", "fork", "free"]), st.integers(0, 9), st.integers(1, 40)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reaches",
    [
        (Reach(),),
        (Reach(6),),
        (Reach(6), Reach()),
        (Reach(), Reach(6), Reach(8, is_chunked=True)),
        (Reach(1), Reach(6, is_chunked=True)),
    ],
    ids=lambda reaches: ", ".join(map(str, reaches)),
)
@settings(max_examples=150, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=60), num_pages=st.sampled_from([20, 40]))
def test_every_token_reads_what_was_written_for_it(reaches: Any, actions: list[tuple[str, int, int]], num_pages: int) -> None:
    writer = Writer(num_pages, reaches)
    for name, which, number in actions:
        getattr(writer, name)(which, number)
        writer.pages.check_integrity(table for _, table, _ in writer.running)
        for text, table, computed in writer.running:
            assert len(list(table.held)) <= writer.pages.max_pages(max(computed, len(text)))
    while writer.running:
        writer.free(0, 0)
    assert not writer.pages.pool.num_held
