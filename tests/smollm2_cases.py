"""What Hugging Face's float32 SmolLM2 says to a few prompts, greedily (data/make_smollm2_reference.py), and how to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REFERENCE = json.loads((Path(__file__).parent / "data" / "smollm2_reference.json").read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = REFERENCE["cases"]
NEAR_TIE = 0.02  # gap of the reference's own two best logits below which either may win


def assert_reference(case: dict[str, Any], ids: list[int], near_tie: float = NEAR_TIE) -> int:
    """The reference's tokens up to a near-tie that went the other way; returns how many."""
    for position, (got, want) in enumerate(zip(ids, case["ids"], strict=False)):
        if got != want:
            gap = case["gaps"][position]
            assert gap < near_tie, f"{case['name']}: token {position} is {got}, not {want} (gap {gap})"
            return position
    assert len(ids) == len(case["ids"])
    return len(ids)
