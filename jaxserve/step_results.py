"""What a step's sampler gave, on the host: tokens and log probabilities by sampled row. Knows no requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxserve.outputs import Logprob, TokenLogprobs
from jaxserve.sampler import MAX_LOGPROBS

StepResults = dict[str, NDArray[Any]]
"""The outputs of sampler.sample, as they came to the host."""


def likeliest(results: StepResults, row: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log probabilities of a row's likeliest tokens, best first; a count below 0 is the whole vocabulary."""
    if 0 <= count <= MAX_LOGPROBS:
        return results["top_ids"][row, :count], results["top_logprobs"][row, :count]
    logprobs = results["all_logprobs"][row]
    ids = np.arange(len(logprobs), dtype=np.int32)
    if 0 <= count < len(logprobs):
        ids = np.sort(np.argpartition(-logprobs, count)[:count])  # so that only these need sorting by likelihood
    ids = ids[np.argsort(-logprobs[ids], kind="stable")]
    return ids, logprobs[ids]


def token_logprobs(results: StepResults, row: int, token: int, count: int, text: Callable[[int], str | None]) -> TokenLogprobs:
    """The entry of a token at its position, and those of the likeliest ones there; `count` as in `likeliest`."""
    ids, logprobs = likeliest(results, row, count)
    entries = {token: Logprob(float(results["logprob"][row]), int(results["rank"][row]), text(token))}
    for rank, (i, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True), start=1):
        if i != token:
            entries[i] = Logprob(logprob, rank, text(i))
    return entries
