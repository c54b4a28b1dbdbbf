"""Normalisations as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation over the last axis.

    Attributes:
        gain: it is multiplied by a weight.
        unit_offset: the gain is 1 + weight (Gemma).
        bias: a bias is added.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    gain: bool = True
    unit_offset: bool = False
    bias: bool = False
