"""What a request gives back: RequestOutput, one CompletionOutput for each of its samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log probability at one position.

    Attributes:
        logprob: natural logarithm, from the model's raw logits (before temperature and penalties).
        rank: 1 for the likeliest token of the vocabulary.
        decoded_token: the token as text.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id -> Logprob at one position: the token that is there, and the likeliest ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt; under OutputKind.DELTA only what is new.

    Attributes:
        index: which of the request's n completions.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's state as its user sees it.

    Attributes:
        prompt: the prompt as text, where it was given as text.
        prompt_logprobs: one entry for each prompt token, the first None.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        error: why the request failed, where finish_reason is "error".
        weight_version: of the weights that the newest tokens come from: 0, and one more for each `update_params`.
        first_weight_version: of those that the first tokens come from; differs if the weights changed in between.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    weight_version: int = 0
    first_weight_version: int = 0
