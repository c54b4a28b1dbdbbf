"""The page pool and the prefix cache, under random use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.page_keys import page_keys, root_key
from jaxserve.page_pool import PagePool
from jaxserve.prefix_cache import PrefixCache


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release", "keep"]), st.integers(0, 9)), max_size=80))
def test_random_use_keeps_the_books(actions: list[tuple[str, int]]) -> None:
    pool = PagePool(6)
    held: list[int] = []
    for action, which in actions:
        if action == "allocate":
            page = pool.allocate()
            assert (page is None) == (len(set(held)) == 6)
            held += [page] if page is not None else []
        elif held:
            page = held[which % len(held)]
            if action == "share":
                pool.share([page])
                held.append(page)
            else:
                pool.release([page], keep=[page] if action == "keep" else ())
                held.remove(page)
        pool.check_integrity()
        assert pool.num_held == len(set(held))
        assert all(pool.holders(page) == held.count(page) for page in range(6))


def test_worthless_pages_go_first_then_the_oldest_kept() -> None:
    pool = PagePool(4)
    pages = [pool.allocate() for _ in range(4)]
    for page, keep in zip([2, 0, 3, 1], [True, False, True, False], strict=True):
        pool.release([page], keep=[page] if keep else ())
    assert [pool.allocate() for _ in pages] == [1, 0, 2, 3]


def test_release_of_a_free_page_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="nobody holds"):
        PagePool(1).release([0])


def test_prefix_cache_finds_chains_and_forgets_reused_pages() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool)
    first = page_keys(root_key(""), [1, 2], 2)[0]
    second = page_keys(first, [3, 4], 2)[0]
    pages = [pool.allocate(), pool.allocate()]
    cache.add(first, pages[0])
    cache.add(second, pages[1])
    assert cache.pages([first, second, b"other"]) == pages
    assert [cache.page(key) for key in (first, second, b"other")] == [*pages, None]
    assert cache.pages([b"other", second]) == []
    pool.release(reversed(pages), keep=cache)
    assert cache.pages([first, second]) == pages
    pool.share(pages[:1])  # a hit takes the free page back
    assert pool.allocate() == pages[1]
    assert cache.pages([first, second]) == pages[:1]
    cache.check_integrity()
