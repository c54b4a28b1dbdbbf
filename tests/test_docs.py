"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from tests.make_reference import PATH, reference

ROOT = Path(__file__).parent.parent


def test_every_option_route_and_metric_is_documented() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tpu").glob("*.md")]
    missing = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\((?!\w+:|#)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert not missing
