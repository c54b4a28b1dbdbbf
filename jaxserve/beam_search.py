"""Beam search: several continuations of a prompt at once, which share the pages of what they have in common.

A beam is a Request whose next token is chosen here, on the host, once the results of all the group's beams have come. Further
children of a beam are forks of it (copy on write); a beam without children gives its pages back at once. When a sequence ends
and when the search does are as in Hugging Face transformers 5 (`GenerationMixin._beam_search`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxserve.completion import Completion
from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import FinishReason, RequestOutput
from jaxserve.request import Request, RequestGroup, Status
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.scheduler import Scheduler

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """What LLM.beam_search looks for; names are vLLM's.

    Attributes:
        beam_width: beams to follow, and sequences to return.
        max_tokens: output tokens at most.
        ignore_eos: go on past the model's end-of-sequence ids.
        temperature: 0; a search draws nothing.
        length_penalty, early_stopping: see SamplingParams.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.beam_width < 1:
            raise InvalidRequestError(f"beam_width must be at least 1; got {self.beam_width}", param="beam_width")
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """The same search as the engine takes it."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            detokenize=False,
            output_kind=OutputKind.FINAL_ONLY,
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """One of the sequences found.

    Attributes:
        tokens: the prompt's and the output's, with the end-of-sequence token where there is one.
        text: of all these tokens, without special ones; empty where no tokenizer is loaded.
        cum_logprob: of the output tokens.
        score: what the sequences are ranked by: cum_logprob / output tokens ** length_penalty.
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """What was found for one prompt: beam_width sequences, the best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


def beam_search_output(output: RequestOutput, params: BeamSearchParams, tokenizer: Tokenizer | None) -> BeamSearchOutput:
    """The engine's output in the form that LLM.beam_search gives."""
    sequences = []
    for found in output.outputs:
        tokens, cum_logprob = output.prompt_token_ids + found.token_ids, found.cumulative_logprob or 0.0
        text = tokenizer.decode(tokens) if tokenizer is not None else ""
        score = beam_score(cum_logprob, len(found.token_ids), params.length_penalty)
        sequences.append(BeamSearchSequence(tokens, text, cum_logprob, score, found.finish_reason, found.stop_reason))
    return BeamSearchOutput(sequences)


def beam_score(cum_logprob: float, num_tokens: int, length_penalty: float) -> float:
    """What sequences of so many output tokens are ranked by."""
    return float(cum_logprob / num_tokens**length_penalty)


class Candidate(NamedTuple):
    """A beam and a next token for it; cum_logprob includes that token's."""

    beam: Request
    token: int
    cum_logprob: float


class Ended(NamedTuple):
    """A sequence that has ended: its output tokens, with the stop token where there is one."""

    score: float
    token_ids: list[int]
    cum_logprob: float


class BeamSearch:
    """Chooses the next tokens of one group's beams, which are the group's requests, the likeliest first.

    Attributes:
        num_candidates: how many next tokens of each beam must be known: as many as beams, and the stop tokens among them.
    """

    def __init__(
        self,
        group: RequestGroup,
        scheduler: Scheduler,
        completions: dict[Request, Completion],
        tokenizer: Tokenizer | None,
    ) -> None:
        self._group = group
        self._scheduler = scheduler
        self._completions = completions
        self._tokenizer = tokenizer
        self._width = group.params.num_samples
        self._results: dict[Request, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        self._ended: list[Ended] = []  # the best, at most as many as beams
        self.num_candidates = self._width + len(group.stop_ids)

    def take(self, beam: Request, token_ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> list[Request]:
        """Takes a beam's likeliest next tokens. The last beam's make every beam go on, or the search end.

        Returns:
            When the search has ended, the best sequences as ended requests, which are the group's from then on; else none.
        """
        self._results[beam] = token_ids, logprobs
        beam.is_held = True
        if beam.num_computed % self._scheduler.page_size == 0:
            self._scheduler.record_computed_pages(beam)
        if len(self._results) < len(self._group.requests):
            return []
        live = self._choose(self._ranked())
        if self._is_over(live):
            return self._end()
        self._go_on(live)
        return []

    def _ranked(self) -> list[Candidate]:
        """The beams' next tokens, likeliest sequence first."""
        beams = self._group.requests
        token_ids = np.stack([self._results[beam][0] for beam in beams])
        logprobs = np.stack([self._results[beam][1] for beam in beams]).astype(np.float64)
        logprobs += np.array([beam.cumulative_logprob for beam in beams])[:, None]
        self._results.clear()
        order = np.argsort(-logprobs, axis=None, kind="stable")[: self._width * (1 + len(self._group.stop_ids))]
        rows, columns = np.unravel_index(order, logprobs.shape)
        chosen = zip(rows.tolist(), token_ids[rows, columns].tolist(), logprobs[rows, columns].tolist(), strict=True)
        return [Candidate(beams[row], token, logprob) for row, token, logprob in chosen]

    def _choose(self, ranked: list[Candidate]) -> list[Candidate]:
        """Takes in the sequences that end, and gives those that go on. Only the first `width` may end: the others stand by."""
        length = self._group.requests[0].num_output_tokens + 1
        is_last = length >= self._group.max_output_tokens
        live: list[Candidate] = []
        for rank, candidate in enumerate(ranked):
            if not is_last and candidate.token not in self._group.stop_ids:
                live.append(candidate)
            elif rank < self._width:
                score = beam_score(candidate.cum_logprob, length, self._group.params.length_penalty)
                self._ended.append(Ended(score, [*candidate.beam.output_token_ids, candidate.token], candidate.cum_logprob))
        self._ended = sorted(self._ended, key=lambda ended: -ended.score)[: self._width]
        return live[: self._width]

    def _is_over(self, live: list[Candidate]) -> bool:
        params = self._group.params
        if not live:
            return True
        if len(self._ended) < self._width:
            return False
        if params.early_stopping is True:
            return True
        length = self._group.requests[0].num_output_tokens + 1
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self._group.max_output_tokens
        return beam_score(live[0].cum_logprob, length, params.length_penalty) <= self._ended[-1].score

    def _go_on(self, live: list[Candidate]) -> None:
        """Gives each candidate its request: the beam itself for its last child, forks for those before."""
        num_children = Counter(candidate.beam for candidate in live)
        for beam in self._group.requests:
            if beam not in num_children:
                self._drop(beam)
        children = []
        for candidate in live:
            num_children[candidate.beam] -= 1
            children.append(self._fork(candidate.beam) if num_children[candidate.beam] else candidate.beam)
        for child, candidate in zip(children, live, strict=True):
            child.token_ids.append(candidate.token)
            child.cumulative_logprob = candidate.cum_logprob
            child.is_held = False
        self._group.requests = children

    def _fork(self, beam: Request) -> Request:
        """A copy of a beam, that shares its pages where it has any and a slot is free; else it is computed when there is one."""
        child = Request(self._group, beam.index, 0, beam.order)
        child.token_ids = list(beam.token_ids)
        child.first_token_s, child.last_token_s = beam.first_token_s, beam.last_token_s
        self._completions[child] = Completion(child, None)
        if beam.status is Status.RUNNING and self._scheduler.num_free_slots:
            self._scheduler.fork(beam, child)
        else:
            child.num_preemptions = beam.num_preemptions + 1  # it is computed again, too, which is no prefix hit
            child.num_cached_tokens = beam.num_cached_tokens
            self._scheduler.add(child)
        return child

    def _drop(self, beam: Request) -> None:
        self._scheduler.finish(beam)
        del self._completions[beam]

    def _end(self) -> list[Request]:
        first = self._group.requests[0]
        for beam in self._group.requests:
            self._drop(beam)
        best = []
        for index, ended in enumerate(self._ended[: self._group.params.n]):
            request = Request(self._group, index, 0, first.order)
            request.cumulative_logprob = ended.cum_logprob
            request.num_cached_tokens = first.num_cached_tokens
            request.scheduled_s, request.first_token_s = first.scheduled_s, first.first_token_s
            self._completions[request] = Completion(request, self._tokenizer)
            for token in ended.token_ids:
                self._completions[request].append(token)
            best.append(request)
        self._group.requests = best
        return best
