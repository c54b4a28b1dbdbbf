"""Request: one completion in the making, as the engine sees it. RequestGroup: what the user submitted, its n Requests."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jaxserve.outputs import FinishReason, TokenLogprobs
from jaxserve.page_keys import PageKey, PromptKeys, page_keys, root_key
from jaxserve.page_table import PageTable
from jaxserve.plan import (
    FREQUENCY,
    MIN_P,
    MIN_POSITION,
    NO_TARGET,
    PRESENCE,
    REPETITION,
    SAMPLE_FIELDS,
    SEED_HIGH,
    SEED_LOW,
    SHAPED,
    TARGET,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    float_bits,
)
from jaxserve.sampler import MAX_LOGPROBS, Mode
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.shaping import Shaping, host_row

if TYPE_CHECKING:
    from jaxserve.beam_search import BeamSearch

MODES = list(Mode)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class RequestGroup:
    """A prompt with its sampling parameters, and the n Requests that answer it.

    Attributes:
        max_output_tokens: resolved from max_tokens and what the model's length leaves.
        arrival_s: time.monotonic() at submission.
        unforked: Requests that wait for the first one's prompt to be computed, to share its pages.
        beams: chooses the tokens on the host, where the requests are the beams of a search.
        error: why it failed.
        first_weight_version: of the weights that its first token comes from.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_output_tokens: int
    stop_ids: frozenset[int]
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    prompt: str | None = None
    cache_salt: str = ""
    continues_text: bool = True
    arrival_s: float = field(default_factory=time.monotonic)
    requests: list[Request] = field(default_factory=list)
    unforked: list[Request] = field(default_factory=list)
    beams: BeamSearch | None = None
    error: str | None = None
    first_weight_version: int | None = None

    @property
    def finished(self) -> bool:
        return all(r.status is Status.FINISHED for r in self.requests)

    def banned_next(self, output_ids: Sequence[int]) -> frozenset[int]:
        """The last tokens of those bad words whose other tokens end the output."""
        return frozenset(
            word[-1] for word in self.bad_word_ids if tuple(output_ids[len(output_ids) - len(word) + 1 :]) == word[:-1]
        )


@dataclass(eq=False, slots=True)
class Request:
    """One completion. Its tokens are the prompt's, then those the host has seen sampled.

    Attributes:
        token_ids: prompt and output; `num_in_flight` more are sampled but not seen by the host yet.
        num_computed: tokens whose keys and values are in the pool once the dispatched steps have run.
        table: of its pages; none of them while it waits.
        order: sorts waiting and running requests; smaller goes first and is preempted last.
        decodes_until: while fewer tokens than this are computed, a step computes the newest one and there is nothing to decide:
            no page to take or copy, no limit to heed, no choice for the host. 0 where that is not so.
        num_passed: how often a later request was admitted past this one.
        is_placed: whether a planned step has given its sampling parameters to its slot.
        bans: token ids that must not come next.
        needs_host: the host must see each token before the next is sampled (beams; bans that depend on the text so far).
        is_held: the host has the results of its last token, and has yet to choose the next one.
        is_silent: nobody looks at a token before the last one, so that it is only kept.
        wants_all_logprobs: log probabilities of the whole vocabulary are asked.
    """

    group: RequestGroup
    index: int
    seed: InitVar[int]
    order: tuple[int, int]
    status: Status = Status.WAITING
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    num_in_flight: int = 0
    num_computed: int = 0
    decodes_until: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_passed: int = 0
    slot: int = -1
    table: PageTable = field(default_factory=PageTable)
    page_keys: list[PageKey] = field(default_factory=list)
    is_placed: bool = False
    is_held: bool = False
    # What it is to give
    stop_ids: frozenset[int] = field(init=False)
    bans: frozenset[int] = field(init=False)
    sample_fields: NDArray[np.int32] = field(init=False)
    mode_rank: int = field(init=False)
    needs_host: bool = field(init=False)
    is_silent: bool = field(init=False)
    wants_all_logprobs: bool = field(init=False)
    # What it has given
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    scheduled_s: float | None = None  # first time in a step
    first_token_s: float | None = None
    last_token_s: float | None = None
    chunk_ends_s: list[float] = field(default_factory=list)  # when each chunk of the prompt was computed

    def __post_init__(self, seed: int) -> None:
        group, params = self.group, self.group.params
        self.token_ids = list(group.prompt_token_ids)
        self.num_prompt_tokens = len(group.prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + group.max_output_tokens
        self.stop_ids = group.stop_ids
        self.bans = group.banned_next(())
        self.sample_fields = sample_fields(group, seed)
        self.mode_rank = MODES.index(sampling_mode(params, bool(self.sample_fields[SHAPED])))
        self.needs_host = group.beams is not None or any(len(word) > 1 for word in group.bad_word_ids)
        is_shown = params.output_kind is not OutputKind.FINAL_ONLY or bool(params.stop)
        self.is_silent = not (is_shown or self.needs_host or self.has_logprobs)
        num_candidates = group.beams.num_candidates if group.beams is not None else None
        wanted = (params.logprobs, params.prompt_logprobs, num_candidates)
        self.wants_all_logprobs = any(n is not None and (n < 0 or n > MAX_LOGPROBS) for n in wanted)
        self.logprobs = [] if params.logprobs is not None else None
        self.prompt_logprobs = [None] * self.num_prompt_tokens if params.prompt_logprobs is not None else []

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt tokens that it computes next are asked."""
        if self.num_computed >= self.num_prompt_tokens - 1:
            return False
        return self.group.params.prompt_logprobs is not None and self.index == 0

    @property
    def has_logprobs(self) -> bool:
        """Whether its tokens' log probabilities are computed."""
        return MODES[self.mode_rank] is Mode.LOGPROBS

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those only the device knows included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Output tokens the host has seen."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_to_compute(self) -> int:
        """Tokens that a step could compute now; 0 when the last allowed one is already sampled."""
        num_tokens = len(self.token_ids) + self.num_in_flight
        if num_tokens >= self.max_num_tokens or self.is_held or (self.needs_host and self.num_in_flight):
            return 0
        return num_tokens - self.num_computed

    def shaping_row(self, vocab_size: int) -> Shaping:
        """What the sampler must know of the request's tokens, biases and bans."""
        params = self.group.params
        bias = dict(params.logit_bias or {}) | dict.fromkeys(self.bans, -math.inf)
        prompt = self.token_ids[: self.num_prompt_tokens]
        return host_row(vocab_size, prompt, self.output_token_ids, bias, params.allowed_token_ids, self.group.stop_ids)

    def update_page_keys(self, page_size: int, prompt_keys: PromptKeys) -> None:
        """Extends page_keys over the full pages of tokens that the host knows."""
        if len(self.token_ids) < (len(self.page_keys) + 1) * page_size:
            return
        if self.page_keys:
            self.page_keys += page_keys(self.page_keys[-1], self.token_ids[len(self.page_keys) * page_size :], page_size)
        else:
            self.page_keys = prompt_keys.of(root_key(self.group.cache_salt), self.token_ids)


def sampling_mode(params: SamplingParams, shaped: bool) -> Mode:
    """The least sample program that can do what the request asks."""
    asks_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    if asks_logprobs or params.best_of is not None or params.use_beam_search:
        return Mode.LOGPROBS
    if shaped:
        return Mode.SHAPED
    if params.is_greedy:
        return Mode.GREEDY
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        return Mode.FULL
    return Mode.PLAIN


def needs_shaping(group: RequestGroup) -> bool:
    """Whether penalties, biases or bans change the request's logits."""
    params = group.params
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    bans = params.allowed_token_ids is not None or group.bad_word_ids or (params.min_tokens and group.stop_ids)
    return bool(penalties or bans or params.logit_bias)


def sample_fields(group: RequestGroup, seed: int) -> NDArray[np.int32]:
    """The request's constant part of a plan's sample row; slot and position are filled in each step."""
    params = group.params
    fields = np.zeros(SAMPLE_FIELDS, np.int32)
    fields[[SEED_LOW, SEED_HIGH]] = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32).view(np.int32)
    fields[TARGET] = NO_TARGET
    fields[TEMPERATURE] = float_bits(params.temperature)
    fields[TOP_K] = params.top_k
    fields[TOP_P] = float_bits(params.top_p)
    fields[MIN_P] = float_bits(params.min_p)
    fields[SHAPED] = needs_shaping(group)
    fields[MIN_POSITION] = len(group.prompt_token_ids) + params.min_tokens
    fields[PRESENCE] = float_bits(params.presence_penalty)
    fields[FREQUENCY] = float_bits(params.frequency_penalty)
    fields[REPETITION] = float_bits(params.repetition_penalty)
    return fields
