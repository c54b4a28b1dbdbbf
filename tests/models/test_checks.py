"""What `jaxserve models` and README say of checks is what tests/goldens holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from jaxserve.models import checks
from jaxserve.models.registry import ARCHITECTURES
from tests.goldens.cases import NAMES, read_config

README = Path(__file__).parents[2] / "README.md"


def test_counts_are_those_of_the_cases() -> None:
    counts = Counter(read_config(name)["architectures"][0] for name in NAMES)
    assert dict(sorted(counts.items())) == checks.LOGITS, "write these counts into models/checks.py"


def test_every_architecture_is_checked() -> None:
    assert [a.name for a in ARCHITECTURES if not checks.check_of(a.name)] == []
    assert set(checks.OTHERS) <= {a.name for a in ARCHITECTURES}


def test_readme_has_the_table() -> None:
    assert checks.models_table() in README.read_text(), "put the output of `jaxserve models --markdown` into README.md"
