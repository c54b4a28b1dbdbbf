"""From sampled tokens to what the user sees: end conditions, text, log probabilities. One Completion a Request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxserve.detokenizer import Detokenizer
from jaxserve.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs
from jaxserve.request import Request, RequestGroup, Status
from jaxserve.sampling_params import OutputKind

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer


class Completion:
    """The user's side of one Request."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        params = request.group.params
        self.request = request
        self._params = params
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, params, continues_text=request.group.continues_text)
        self._num_read = request.num_prompt_tokens  # tokens that the detokenizer has been given, or must not be
        self._num_given = 0  # tokens that DELTA outputs have carried
        self._changed = True

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Takes the next sampled token, and decides whether the request ends with it."""
        self.request.token_ids.append(token_id)
        if logprobs is not None and self.request.logprobs is not None:
            self.request.logprobs.append(logprobs)
        self.check_end()

    def check_end(self) -> None:
        """Decides whether the request ends with its last token; takes in all tokens since the last look."""
        request = self.request
        self._changed = True
        token_id = request.token_ids[-1]
        at_stop_id = token_id in request.stop_ids and request.num_output_tokens > self._params.min_tokens
        is_shown = not at_stop_id or self._params.include_stop_str_in_output
        matched = self._read(len(request.token_ids) - (not is_shown))
        if matched is not None:
            self.end("stop", matched)
        elif at_stop_id:
            self.end("stop", token_id if token_id in self._params.stop_token_ids else None)
        elif len(request.token_ids) >= request.max_num_tokens:
            self.end("length")

    def _read(self, end: int) -> str | None:
        """Makes text of the tokens before `end`; returns the stop string that has ended it."""
        if self._detokenizer is None:
            return None
        start, self._num_read = self._num_read, end
        return self._detokenizer.append(self.request.token_ids[start:end])

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Marks the request as ended; the engine then takes it out of the scheduler."""
        self.request.finish_reason = reason
        self.request.stop_reason = stop_reason
        self._changed = True
        if self._detokenizer is not None:
            self._detokenizer.finish()

    def cut_off(self, reason: FinishReason) -> None:
        """Ends the request between two tokens."""
        self._read(len(self.request.token_ids))
        self.end(reason)

    def output(self) -> CompletionOutput | None:
        """What there is to show; None where nothing is new under OutputKind.DELTA."""
        request, detokenizer, start = self.request, self._detokenizer, 0
        if self._params.output_kind is OutputKind.DELTA:
            if not self._changed:
                return None
            start, self._num_given = self._num_given, request.num_output_tokens
            text = detokenizer.take_delta() if detokenizer is not None else ""
        else:
            text = detokenizer.text if detokenizer is not None else ""
        self._changed = False
        return CompletionOutput(
            index=request.index,
            text=text,
            token_ids=request.token_ids[request.num_prompt_tokens + start :],
            cumulative_logprob=request.cumulative_logprob if request.has_logprobs else None,
            logprobs=None if request.logprobs is None else request.logprobs[start:],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )


def group_output(group: RequestGroup, completions: dict[Request, Completion], weight_version: int) -> RequestOutput | None:
    """What a user's request has to show now; None where there is nothing.

    Args:
        weight_version: of the weights that the newest tokens come from.
    """
    finished = all(r.finish_reason is not None for r in group.requests)
    if (group.params.output_kind is OutputKind.FINAL_ONLY or group.beams is not None) and not finished:
        return None
    outputs = [output for r in group.requests if (output := completions[r].output()) is not None]
    if group.params.best_of is not None and group.beams is None:
        outputs = _best(outputs, group.params.n, finished)
    if not outputs and not finished:
        return None
    return RequestOutput(
        request_id=group.request_id,
        prompt=group.prompt,
        prompt_token_ids=group.prompt_token_ids,
        outputs=outputs,
        finished=finished,
        num_cached_tokens=group.requests[0].num_cached_tokens,
        prompt_logprobs=group.requests[0].prompt_logprobs if group.params.prompt_logprobs is not None else None,
        error=group.error if finished else None,
        weight_version=weight_version,
        first_weight_version=weight_version if group.first_weight_version is None else group.first_weight_version,
    )


def _best(outputs: list[CompletionOutput], n: int, finished: bool) -> list[CompletionOutput]:
    """The n likeliest of best_of completions, numbered anew, those that failed last; none before all have ended."""
    if not finished:
        return []
    ranked = sorted(outputs, key=lambda o: (o.finish_reason == "error", -(o.cumulative_logprob or 0.0)))[:n]
    for index, output in enumerate(ranked):
        output.index = index
    return ranked


def is_live(request: Request) -> bool:
    """Whether the request still wants tokens."""
    return request.status is not Status.FINISHED and request.finish_reason is None
