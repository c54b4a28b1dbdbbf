"""Which free or held page holds which tokens: a SHA-256 chain over pages of tokens. Shared pages are full, and never written.

The key of a page is SHA-256(key of the page before it, its tokens); the first page's parent is the digest of the request's
extras (cache_salt, adapter, media). Never Python's hash(), which collides on purpose-made input.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from jaxserve.page_pool import PagePool

PageKey = bytes


def root_key(*extras: str) -> PageKey:
    """The parent of a request's first page: requests with other extras share nothing."""
    digest = hashlib.sha256()
    for extra in extras:
        encoded = extra.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def page_keys(parent: PageKey, token_ids: Sequence[int], page_size: int) -> list[PageKey]:
    """The keys of the full pages that hold these tokens after what `parent` stands for."""
    tokens, size, sha256 = array("i", token_ids).tobytes(), 4 * page_size, hashlib.sha256
    return [parent := sha256(parent + tokens[i : i + size]).digest() for i in range(0, len(tokens) - size + 1, size)]


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
