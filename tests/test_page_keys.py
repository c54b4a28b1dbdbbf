"""The keys of pages: what they depend on, and that remembering prompts changes none of them."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import page_keys as module
from jaxserve.page_keys import PromptKeys, page_keys, root_key

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12)


def test_keys_depend_on_tokens_order_and_extras() -> None:
    keys = {
        page_keys(root_key(*extras), tokens, 2)[0] for extras in [(), ("a",), ("a", "b"), ("ab",)] for tokens in ([1, 2], [2, 1])
    }
    assert len(keys) == 8


@given(prompts=PROMPTS, salts=st.lists(st.sampled_from(["", "a"]), min_size=12, max_size=12), capacity=st.integers(1, 3))
def test_prompts_get_the_keys_of_their_pages(prompts: list[list[int]], salts: list[str], capacity: int) -> None:
    remembered = PromptKeys(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_RECENT", capacity)
        for prompt, salt in zip(prompts, salts, strict=False):
            keys = remembered.of(root_key(salt), prompt)
            assert keys == page_keys(root_key(salt), prompt, 3)
            keys.append(b"the caller's own list")
            assert len(remembered._recent) <= capacity


def test_pages_in_common_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered, count = PromptKeys(2), 0

    def sha256(data: bytes) -> hashlib._Hash:
        nonlocal count
        count += 1
        return hashlib.new("sha256", data)

    monkeypatch.setattr(module.hashlib, "sha256", sha256)
    prefix = list(range(20))
    for number, tail in enumerate(([50, 51], [60, 61, 62, 63], [50, 51])):
        before = count
        remembered.of(b"root", prefix + tail)
        assert count - before == (11 if number == 0 else 1 + len(tail) // 2), (
            "the first page, by which a prompt is found, and its own"
        )
