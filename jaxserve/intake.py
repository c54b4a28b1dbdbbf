"""Intake: gives a step's results to the requests that they are for. Knows no schedule, and not what users are shown."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.completion import Completion, is_live
from jaxserve.plan import NO_TARGET
from jaxserve.reporter import Reporter
from jaxserve.request import Request, RequestGroup, Status
from jaxserve.sampler import NO_TOKEN
from jaxserve.sampling_params import OutputKind
from jaxserve.scheduler import Scheduler
from jaxserve.step_results import StepResults, likeliest, token_logprobs
from jaxserve.step_runner import InFlight, StepRunner

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NO_TOKEN_ERROR = "no token can be sampled: the model's logits are not finite here, or every token is banned"

Changed = dict[str, RequestGroup]
"""Request id -> a group about which there may be something to show."""


class Intake:
    """Takes in steps, in the order in which they ran.

    Attributes:
        answered: ids of the requests whose first token came with the last step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        completions: dict[Request, Completion],
        tokenizer: Tokenizer | None,
        reporter: Reporter,
        clock: Callable[[], float],
    ) -> None:
        self.answered: list[str] = []
        self._scheduler = scheduler
        self._runner = runner
        self._completions = completions
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._clock = clock

    def take(self, step: InFlight) -> Changed:
        """Waits for a step's results and gives each sampled token to its request."""
        results = self._runner.collect(step)
        now = self._reporter.tokens_s = self._clock()
        changed: Changed = {}
        sampled = results["tokens"] if results else np.zeros(0, np.int32)
        tokens = (sampled[0] if step.plan.ahead else sampled).tolist()
        if NO_TOKEN in tokens:
            self._end_without_token([*step.plan.decodes, *(row.request for row in step.rows)], tokens, changed)
        taken = self._take_decodes(step.plan.decodes, tokens, results, changed)
        for i, row in enumerate(step.rows, start=len(step.plan.decodes)):
            request = row.request
            if row.target != NO_TARGET:
                count = request.group.params.prompt_logprobs or 0
                request.prompt_logprobs[row.position] = token_logprobs(results, i, row.target, count, self._token_text)
                continue
            request.num_in_flight -= 1
            if is_live(request):
                taken.append(request)
                self._take_token(request, i, tokens[i], results, changed)
                if request.group.first_weight_version is None:
                    request.group.first_weight_version = step.weight_version
                if request.first_token_s is None:
                    request.first_token_s = now
                    self.answered.append(request.group.request_id)
        self._reporter.on_tokens(taken, now)
        num_sampled = len(taken)
        for number, requests in enumerate(step.plan.ahead, start=1):
            tokens = sampled[number, step.plan.places(requests)].tolist()
            if NO_TOKEN in tokens:
                self._end_without_token(requests, tokens, changed)
            taken = self._take_decodes(requests, tokens, results, changed)
            self._reporter.on_tokens(taken, now)
            num_sampled += len(taken)
        self._reporter.on_step(step.plan, self._scheduler, num_sampled)
        return changed

    def finish(self, request: Request) -> None:
        """Takes a request that has ended out of the scheduler."""
        self._scheduler.record_computed_pages(request)
        self._scheduler.finish(request)
        self._reporter.on_finished(request)

    def _end_without_token(self, requests: list[Request], tokens: list[int], changed: Changed) -> None:
        """Ends the requests whose logits allow no token, and what depends on them. What they computed is no good to others."""
        for request in [r for r, token in zip(requests, tokens, strict=False) if token == NO_TOKEN and is_live(r)]:
            group = request.group
            group.error = NO_TOKEN_ERROR
            changed[group.request_id] = group
            for ended in group.requests if group.beams is not None or group.unforked else [request]:
                if is_live(ended):
                    self._completions[ended].cut_off("error")
                    self._scheduler.finish(ended, is_sound=False)
                    self._reporter.on_finished(ended)

    def _take_decodes(self, requests: list[Request], tokens: list[int], results: StepResults, changed: Changed) -> list[Request]:
        """Gives requests that just go on their tokens, if they still live, and returns these. All pass here in every step."""
        finished, taken = Status.FINISHED, []
        for i, request, token in zip(range(len(tokens)), requests, tokens, strict=False):  # tokens are padded
            request.num_in_flight -= 1
            if request.status is finished:
                continue
            taken.append(request)
            if not request.is_silent:
                self._take_token(request, i, token, results, changed)
                continue
            token_ids = request.token_ids
            token_ids.append(token)
            if len(token_ids) == request.max_num_tokens or token in request.stop_ids:
                self._completions[request].check_end()
                if request.finish_reason is not None:
                    self.finish(request)
                    changed[request.group.request_id] = request.group
        return taken

    def _take_token(self, request: Request, row: int, token: int, results: StepResults, changed: Changed) -> None:
        """Gives a request its next token. What goes wrong with that ends the user's request, and no other's."""
        try:
            self._take_with_all(request, row, token, results, changed)
        except Exception:
            log.exception("request %s cannot go on", request.group.request_id)
            group = request.group
            group.error = "internal error; the log has the details"
            changed[group.request_id] = group
            for ended in group.requests:
                if is_live(ended):
                    self._completions[ended].cut_off("error")
                    self.finish(ended)

    def _take_with_all(self, request: Request, row: int, token: int, results: StepResults, changed: Changed) -> None:
        """Gives a request its next token, with all that it may have asked for."""
        group = request.group
        if (beams := group.beams) is not None:
            changed[group.request_id] = group
            for ended in beams.take(request, *likeliest(results, row, beams.num_candidates)):
                self.finish(ended)
            return
        wanted = group.params.logprobs
        logprobs = None if wanted is None else token_logprobs(results, row, token, wanted, self._token_text)
        if request.has_logprobs:
            request.cumulative_logprob += float(results["logprob"][row])
        self._completions[request].append(token, logprobs)
        if request.finish_reason is not None:
            self.finish(request)
        elif request.needs_host and (bans := group.banned_next(request.output_token_ids)) != request.bans:
            request.bans = bans
            if request.is_placed:  # else the row is written when it gets a slot again
                self._runner.set_shaping(request)
        if request.finish_reason is not None or group.params.output_kind is not OutputKind.FINAL_ONLY:
            changed[group.request_id] = group

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)
