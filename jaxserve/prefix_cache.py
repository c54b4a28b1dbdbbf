"""Which free or held page holds which tokens. Shared pages are full, and never written."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.page_keys import PageKey
from jaxserve.page_pool import PagePool


class PrefixCache:
    """Finds the pages that already hold a prompt's beginning, for each group of layers apart.

    Attributes:
        queries, hits: prompt tokens looked up and found so far.
    """

    def __init__(self, pool: PagePool, num_groups: int = 1) -> None:
        self.queries = 0
        self.hits = 0
        self._page_of: list[dict[PageKey, int]] = [{} for _ in range(num_groups)]
        self._key_of: dict[int, tuple[int, PageKey]] = {}
        pool.on_reuse = self.forget

    def __contains__(self, page: object) -> bool:
        return page in self._key_of

    def page(self, key: PageKey, group: int = 0) -> int | None:
        """The page that holds what the key stands for, not yet held for the caller."""
        return self._page_of[group].get(key)

    def group_of(self, page: int) -> int | None:
        """Whose layers' page it is, if it is here."""
        found = self._key_of.get(page)
        return None if found is None else found[0]

    def pages(self, keys: Sequence[PageKey], group: int = 0) -> list[int]:
        """The pages of the beginning that are here without a gap, not yet held for the caller."""
        found = list(map(self._page_of[group].get, keys))
        return found[: found.index(None)] if None in found else found  # type: ignore[return-value]

    def add(self, key: PageKey, page: int, group: int = 0) -> None:
        """Records that a full page holds what the key stands for. The first page with a key keeps it."""
        if key not in self._page_of[group] and page not in self._key_of:
            self._page_of[group][key] = page
            self._key_of[page] = group, key

    def clear(self) -> None:
        """Forgets everything; held pages stay held."""
        for pages in self._page_of:
            pages.clear()
        self._key_of.clear()

    def forget(self, *pages: int) -> None:
        """What they hold is lost, or no good."""
        for page in pages:
            if (found := self._key_of.pop(page, None)) is not None:
                group, key = found
                del self._page_of[group][key]

    def check_integrity(self) -> None:
        """Raises AssertionError where the two directions disagree."""
        forward = {page: (group, key) for group, pages in enumerate(self._page_of) for key, page in pages.items()}
        assert forward == self._key_of, "prefix cache maps disagree"
