"""KvPages: takes, shares, copies and frees the pages of page tables, whatever groups of layers there are. Knows no requests.

Every group takes its pages from the one pool. Groups that see all tokens get a prompt's pages when it starts; the others get a
step's as it comes, and give back what their windows have passed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from jaxserve.models.cache_layout import Reach
from jaxserve.page_keys import PageKey
from jaxserve.page_pool import PagePool
from jaxserve.page_table import NO_PAGE, Column, PageTable
from jaxserve.prefix_cache import PrefixCache


class KvPages:
    """The pool as page tables see it.

    Attributes:
        prefix_cache: where full pages are found again, if at all.
    """

    def __init__(
        self, pool: PagePool, page_size: int, prefix_cache: PrefixCache | None, reaches: Sequence[Reach], max_chunk: int
    ) -> None:
        """
        Args:
            reaches: of the tables' columns.
            max_chunk: tokens of a request that a step computes at most.
        """
        self.pool = pool
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._reaches = tuple(reaches)
        self._windowed = [i for i, reach in enumerate(reaches) if reach.window is not None]
        self._max_chunk = max_chunk

    # How much

    def max_pages(self, num_tokens: int) -> int:
        """Pages that a request of so many tokens holds at most."""
        return sum(reach.max_pages(num_tokens, self.page_size, self._max_chunk) for reach in self._reaches)

    def can_start(self, table: PageTable, num_tokens: int) -> bool:
        """Whether a request can be had whose tokens will be so many, and of whose beginning `table` was found."""
        held_by_others = self.pool.num_held_of(table.held)
        needed = sum(
            min(self._pages(num_tokens) - column.num_passed, reach.max_pages(num_tokens, self.page_size, self._max_chunk))
            for reach, column in zip(self._reaches, table.columns, strict=True)
        )
        return needed - held_by_others <= self.pool.num_free

    def num_empty(self, table: PageTable, num_tokens: int) -> int:
        """Tokens for which there is room in the table's pages, but which are not there."""
        return sum(len(column.pages) * self.page_size - num_tokens for column in table.columns)

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # The beginning of a request

    def find(self, keys: Sequence[PageKey]) -> PageTable:
        """The table of the longest cached beginning from which a request can go on; its pages are not held yet.

        It needs all pages of those groups that see everything, and of the others what the next token sees.
        """
        found = self._num_found(keys) if self.prefix_cache is not None else 0
        return PageTable([self._found_column(i, keys[:found]) for i in range(len(self._reaches))], num_cached=found)

    def _num_found(self, keys: Sequence[PageKey]) -> int:
        assert self.prefix_cache is not None
        for i in range(len(self._reaches)):
            if i not in self._windowed:
                keys = keys[: len(self.prefix_cache.pages(keys, i))]
        if not self._windowed:
            return len(keys)
        found, in_a_row = 0, [0] * len(self._reaches)
        for count, key in enumerate(keys, start=1):
            for i in self._windowed:
                in_a_row[i] = in_a_row[i] + 1 if self.prefix_cache.page(key, i) is not None else 0
            if all(in_a_row[i] >= count - self._first_page(i, count * self.page_size) for i in self._windowed):
                found = count
        return found

    def _found_column(self, index: int, keys: Sequence[PageKey]) -> Column:
        passed = self._first_page(index, len(keys) * self.page_size)
        pages = self.prefix_cache.pages(keys[passed:], index) if self.prefix_cache is not None else []
        return Column([NO_PAGE] * passed + pages, passed)

    def _first_page(self, index: int, position: int) -> int:
        """The first page that a column still needs when the token at `position` is computed next."""
        return self._reaches[index].first_read(position) // self.page_size

    # Taking and giving back

    def share(self, table: PageTable) -> None:
        """One more request holds the table's pages."""
        self.pool.share(table.held)

    def reserve(self, table: PageTable, start: int, stop: int, known: int, copies: list[tuple[int, int]]) -> bool:
        """Gets the pages to compute the tokens from `start` to `stop`, all or none.

        Args:
            known: how many tokens there are already; pages for all of them where none is ever given back.
            copies: shared pages that will be written, and those that take their places, are added to it.
        """
        ahead = max(stop, known)
        missing = [
            self._pages(ahead if reach.window is None else stop) - len(column.pages)
            for reach, column in zip(self._reaches, table.columns, strict=True)
        ]
        if max(missing) <= 0 and not table.is_shared:
            return True
        index, offset = divmod(start, self.page_size)
        written = [c for c in table.columns if offset and self.pool.holders(c.pages[index]) > 1]
        if sum(max(count, 0) for count in missing) + len(written) > self.pool.num_free:
            return False
        for column, count in zip(table.columns, missing, strict=True):
            column.pages += [self._allocate() for _ in range(count)]
        for column in written:
            copies.append((column.pages[index], self._allocate()))
            self.pool.release([column.pages[index]])
            column.pages[index] = copies[-1][1]
            column.num_sent = min(column.num_sent, index)
        table.is_shared = False  # from here on the request writes to pages of its own
        return True

    def grow(self, table: PageTable) -> bool:
        """One more page for each column, sent to the device with the next step, if they can be had."""
        if self.pool.num_free < len(table.columns):
            return False
        for column in table.columns:
            column.pages.append(self._allocate())
            column.num_sent += 1
        return True

    def has_passed(self, table: PageTable, position: int) -> bool:
        """Whether some page is read no more when the token at `position` is computed next."""
        if not self._windowed:  # asked for each page of each request
            return False
        return any(self._first_page(i, position) > table.columns[i].num_passed for i in self._windowed)

    def release_passed(self, table: PageTable, position: int) -> None:
        """Gives back the pages that are read no more when the token at `position` is computed next."""
        for i in self._windowed:
            self._release(table.columns[i].let_go(self._first_page(i, position)))

    def free(self, table: PageTable) -> None:
        """Gives back all pages of a table that is used no more."""
        # Back to front: the beginning of a prompt is what others share, so it should be the last to be reused.
        for column in table.columns:
            self._release(reversed(column.held))

    def _allocate(self) -> int:
        page = self.pool.allocate()
        assert page is not None, "the caller has counted the free pages"
        return page

    def _release(self, pages: Iterable[int]) -> None:
        self.pool.release(pages, keep=() if self.prefix_cache is None else self.prefix_cache)

    # The prefix cache

    def record(self, table: PageTable, keys: Sequence[PageKey]) -> None:
        """Offers the prefix cache the table's first pages, which are full and computed."""
        if self.prefix_cache is None:
            return
        for i, column in enumerate(table.columns):
            for at in range(max(table.num_cached, column.num_passed), len(keys)):
                self.prefix_cache.add(keys[at], column.pages[at], i)
        table.num_cached = max(table.num_cached, len(keys))

    def forget(self, table: PageTable) -> None:
        """Nobody is to find what the table's pages hold or held."""
        if self.prefix_cache is not None:
            self.prefix_cache.forget(*(page for column in table.columns for page in column.pages))

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError where these, which are all, do not agree with the pool."""
        tables = list(tables)
        self.pool.check_integrity([page for table in tables for page in table.held])
        by_group = [{page for t in tables for page in t.columns[i].held} for i in range(len(self._reaches))]
        shared = [page for page, count in Counter(chain.from_iterable(by_group)).items() if count > 1]
        assert not shared, f"pages {shared} are in the tables of several groups"
        if self.prefix_cache is not None:
            self.prefix_cache.check_integrity()
            for i, pages in enumerate(by_group):
                assert all(self.prefix_cache.group_of(page) in (None, i) for page in pages), "a page is cached for another group"
