"""For tests of models and their parts: they compile much and run little."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quickest_compiles(quickest_compiles: None) -> None:
    """In every test of this folder."""
