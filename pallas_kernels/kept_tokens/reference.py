"""What is kept, the slow way: one row, sorted, in NumPy's float64. The oracle of the tests."""

from __future__ import annotations

import numpy as np


def kept(scaled: np.ndarray, top_k: int, top_p: float, min_p: float, slack: float = 0.0) -> np.ndarray:
    """Which tokens of one row [V] are kept, ties at each threshold too; -inf are where the largest is.

    Args:
        slack: how much more of the probability top-p and min-p are to keep, as a part of it: rounding may decide about so much.
    """
    scaled = scaled.astype(np.float64)
    largest = np.sort(scaled)[::-1]
    if 0 < top_k < len(scaled):
        largest = largest[largest >= largest[top_k - 1]]
    weights = np.exp(largest - largest[0])
    least = largest[-1]
    if top_p < 1:
        reached = np.cumsum(weights) >= weights.sum() * min(max(top_p + slack, 0.0), 1.0)
        least = largest[np.argmax(reached)] if reached.any() else largest[-1]
    if min_p > 0:
        least = max(least, largest[0] + np.log(min_p) - slack)
    mask: np.ndarray = scaled >= least
    return mask
