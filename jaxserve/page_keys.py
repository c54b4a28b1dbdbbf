"""By what full pages are found again: a SHA-256 chain over pages of tokens. Knows neither pages nor requests.

The key of a page is SHA-256(key of the page before it, its tokens); the first page's parent is the digest of the request's
extras (cache_salt, adapter, media). Never Python's hash(), which collides on purpose-made input.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

PageKey = bytes

MAX_RECENT = 64  # prompts whose keys are remembered


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


class PromptKeys:
    """page_keys of prompts. Many begin as one shortly before did: the pages that both have are compared, not hashed again."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._recent: dict[PageKey, tuple[array[int], list[PageKey]]] = {}  # the last prompt with each first page

    def of(self, root: PageKey, token_ids: Sequence[int]) -> list[PageKey]:
        """The keys of the prompt's full pages."""
        size, tokens = self._page_size, array("i", token_ids)
        first = page_keys(root, tokens[:size], size)
        if not first:
            return []
        before, keys = self._recent.pop(first[0], (tokens[:size], first))
        common = _num_equal(tokens, before) // size
        keys = keys[:common]
        keys += page_keys(keys[-1], tokens[common * size :], size)
        self._recent[first[0]] = tokens, keys
        if len(self._recent) > MAX_RECENT:
            del self._recent[next(iter(self._recent))]
        return list(keys)


def _num_equal(a: array[int], b: array[int]) -> int:
    """How many numbers both begin with."""
    shorter = min(len(a), len(b))
    differs = np.frombuffer(a, np.int32, shorter) != np.frombuffer(b, np.int32, shorter)
    return int(differs.argmax()) if differs.any() else shorter
