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
    tokens, size, keys = array("i", token_ids).tobytes(), 4 * page_size, []
    for start in range(0, len(tokens) - size + 1, size):
        parent = hashlib.sha256(parent + tokens[start : start + size]).digest()
        keys.append(parent)
    return keys


class PrefixCache:
    """Finds the pages that already hold a prompt's beginning.

    Attributes:
        queries, hits: prompt tokens looked up and found so far.
    """

    def __init__(self, pool: PagePool) -> None:
        self.queries = 0
        self.hits = 0
        self._pool = pool
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}
        pool.on_reuse = self.forget

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    def find(self, keys: Sequence[PageKey]) -> list[int]:
        """The pages of the longest cached beginning, not yet held for the caller."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def add(self, key: PageKey, page: int) -> None:
        """Records that a full page holds what the key stands for. The first page with a key keeps it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def clear(self) -> None:
        """Forgets everything; held pages stay held."""
        self._page_of.clear()
        self._key_of.clear()

    def forget(self, *pages: int) -> None:
        """What they hold is lost, or no good."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def check_integrity(self) -> None:
        """Raises AssertionError where the two directions disagree."""
        assert self._page_of == {key: page for page, key in self._key_of.items()}, "prefix cache maps disagree"
