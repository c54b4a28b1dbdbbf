"""For whatever compiles for devices that are not there."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True, scope="module")
def quick_compiles() -> None:
    """Compiles as users do."""


@pytest.fixture
def no_compile_cache() -> Iterator[None]:
    """What is compiled for absent devices cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is in use
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
