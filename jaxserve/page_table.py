"""PageTable: which pages hold one request's keys and values. Models whose layers read differently far back have several columns:
one for each group of layers, all with the same tokens at the same index. Knows neither pool nor device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

NO_PAGE = -1


@dataclass(slots=True)
class Column:
    """The pages of one group of layers.

    Attributes:
        pages: in order. The first num_passed are others' by now, as no layer reads them any more, or NO_PAGE.
        num_sent: the device's table has the first so many, but for those that are NO_PAGE.
    """

    pages: list[int] = field(default_factory=list)
    num_passed: int = 0
    num_sent: int = 0

    @property
    def held(self) -> list[int]:
        """Those that are still its own."""
        return self.pages[self.num_passed :] if self.num_passed else self.pages

    @property
    def unsent(self) -> range:
        """The entries that the device's table lacks."""
        return range(max(self.num_sent, self.num_passed), len(self.pages))

    def let_go(self, passed: int) -> list[int]:
        """The held ones among the first `passed` pages, which it holds no more."""
        gone = self.pages[self.num_passed : passed]
        for i in range(max(self.num_passed, self.num_sent), passed):
            self.pages[i] = NO_PAGE  # the device will never hear of it
        self.num_passed = max(self.num_passed, passed)
        return gone

    def forked(self) -> Column:
        """A column that begins with the same held pages."""
        return Column([NO_PAGE] * self.num_passed + self.held, self.num_passed)


@dataclass(slots=True)
class PageTable:
    """All columns of a request.

    Attributes:
        columns: none before it runs.
        num_cached: pages that the prefix cache has been offered.
        is_shared: whether it was forked, so that a page it writes may be another's too.
    """

    columns: list[Column] = field(default_factory=list)
    num_cached: int = 0
    is_shared: bool = False

    @property
    def held(self) -> Iterator[int]:
        """Every page that the request holds."""
        return (page for column in self.columns for page in column.held)

    @property
    def num_pages(self) -> int:
        """Pages' worth of tokens that every column has room for."""
        return min((len(column.pages) for column in self.columns), default=0)

    @property
    def num_unsent(self) -> int:
        return sum(len(column.unsent) for column in self.columns)

    @property
    def last_entries(self) -> list[range]:
        """The last entry of each column."""
        return [range(len(column.pages) - 1, len(column.pages)) for column in self.columns]

    def send(self) -> list[range]:
        """Notes that the next step brings the device all that its table lacks; gives the entries, by columns."""
        entries = [column.unsent for column in self.columns]
        for column in self.columns:
            column.num_sent = len(column.pages)
        return entries

    def unsend(self, entries: list[range]) -> None:
        """The step that was to bring these entries does not."""
        for column, unsent in zip(self.columns, entries, strict=True):
            column.num_sent = unsent.start

    def forked(self) -> PageTable:
        """A table that shares all held pages, which both must copy before they write to them."""
        self.is_shared = True
        return PageTable([column.forked() for column in self.columns], self.num_cached, is_shared=True)
