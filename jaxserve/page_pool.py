"""The host side of the KV pool: which pages are free, and how many requests hold each. Knows no tokens and no device."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence


class PagePool:
    """Reference-counted pages. A page nobody holds is free, but keeps its content until it is handed out again.

    Free pages are handed out from the front: pages released to be kept go to the back, so they leave in LRU order and
    after all pages whose content is worthless.

    Attributes:
        on_reuse: called with a page whose content is about to be lost.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.on_reuse: Callable[[int], None] = lambda page: None
        self._holders = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_pages - len(self._free)

    def holders(self, page: int) -> int:
        """How many requests hold the page."""
        return self._holders[page]

    def num_held_of(self, pages: Iterable[int]) -> int:
        """How many of these somebody holds."""
        return sum(map(bool, map(self._holders.__getitem__, pages)))

    def allocate(self) -> int | None:
        """A page with one holder, or None when all are held."""
        if not self._free:
            return None
        page, _ = self._free.popitem(last=False)
        self.on_reuse(page)
        self._holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each page, which may be free (a prefix hit takes it back)."""
        holders = self._holders  # thousands of pages in a step, where many requests begin alike
        for page in pages:
            if holders[page] == 0:
                del self._free[page]
            holders[page] += 1

    def release(self, pages: Iterable[int], keep: Container[int] = ()) -> None:
        """One holder less of each page, in this order; the last one frees it. Those in `keep` are worth holding on to."""
        holders = self._holders
        for page in pages:
            assert holders[page] > 0, f"page {page} is released but nobody holds it"
            holders[page] -= 1
            if holders[page] == 0:
                self._free[page] = None
                if page not in keep:
                    self._free.move_to_end(page, last=False)

    def check_integrity(self, held: Sequence[int] | None = None) -> None:
        """Raises AssertionError where the free list and the counts disagree.

        Args:
            held: the pages that somebody holds, once for each holder.
        """
        free = {page for page, holders in enumerate(self._holders) if holders == 0}
        assert free == set(self._free), f"free list and counts differ on pages {free ^ set(self._free)}"
        assert min(self._holders, default=0) >= 0, "a page has fewer than no holders"
        if held is not None:
            counts = Counter(held)
            wrong = [page for page, holders in enumerate(self._holders) if holders != counts[page]]
            assert not wrong, f"pages {wrong} have a wrong number of holders"
