"""Whether an answer names the capital; for lm-eval's task capitals_chat."""

from __future__ import annotations

from typing import Any


def contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"contains": float(doc["capital"] in results[0])}
