"""For what compiles for GPUs that are not there."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiles() -> None:
    """Compiles as users do."""
