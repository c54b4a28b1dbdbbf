"""The engine's loop: schedule and dispatch the next step while the one before runs, then collect that one. No HTTP, no threads.

The host learns of a request's end one step late. The token of that extra step is dropped and counts nowhere.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.beam_search import BeamSearch
from jaxserve.completion import Completion, group_output, is_live
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDeadError, InvalidRequestError, PromptTooLongError
from jaxserve.metrics import FinishedStats, Observer, StepStats, TokenStats
from jaxserve.outputs import FinishReason, RequestOutput
from jaxserve.plan import NO_TARGET
from jaxserve.request import Request, RequestGroup
from jaxserve.runner import InFlight, Runner
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_results import likeliest, token_logprobs

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_FAILURES = 2  # steps that may fail in a row before the engine gives up


class Engine:
    """Serves requests by continuous batching. Single-threaded: every method is called from one thread.

    Attributes:
        config: resolved: nothing is None that the engine needs.
        default_sampling: the model's own sampling defaults.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
        default_sampling: dict[str, Any] | None = None,
        description: dict[str, str] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.default_sampling = default_sampling or {}
        self.description = description or {}
        self.observer = observer
        self._groups: dict[str, RequestGroup] = {}
        self._completions: dict[Request, Completion] = {}
        self._in_flight: InFlight | None = None
        self._failures = 0
        self._order = itertools.count()
        self._names = itertools.count()
        self._seeds = np.random.default_rng(config.model.seed)

    @property
    def max_model_len(self) -> int:
        assert self.config.model.max_model_len is not None
        return self.config.model.max_model_len

    @property
    def has_work(self) -> bool:
        return bool(self._groups) or self._in_flight is not None

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> str:
        """Queues a prompt; its outputs come from later calls of `step`.

        Returns:
            The request's id.

        Raises:
            InvalidRequestError: a parameter or token id is out of range.
            PromptTooLongError: the prompt leaves no room for an output token.
        """
        request_id = f"request-{next(self._names)}" if request_id is None else request_id
        self.check(request_id, prompt_token_ids, params)
        room = self.max_model_len - len(prompt_token_ids)
        group = RequestGroup(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            max_output_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids),
            bad_word_ids=self._bad_words(params),
            prompt=prompt,
            cache_salt=cache_salt,
        )
        if params.use_beam_search:
            group.beams = BeamSearch(group, self.scheduler, self._completions, self.tokenizer)
        seed = int(self._seeds.integers(2**63)) if params.seed is None else params.seed
        for index in range(1 if params.use_beam_search else params.num_samples):
            request = Request(group, index, seed + index, (priority, next(self._order)))
            group.requests.append(request)
            self._completions[request] = Completion(request, self.tokenizer)
        group.unforked = group.requests[1:]
        self.scheduler.add(group.requests[0])
        self._groups[request_id] = group
        return request_id

    def abort(self, request_id: str) -> None:
        """Ends a request without output and frees its pages at once; an unknown or ended one is ignored."""
        group = self._groups.get(request_id)
        if group is None:
            return
        for request in group.requests:
            if is_live(request):
                self._completions[request].end("abort")
                self._finish(request)
        self._forget(group)

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step and takes in the results of the one before.

        Returns:
            One output for each request that has something to show.

        Raises:
            EngineDeadError: steps failed repeatedly; the cause is chained.
        """
        try:
            before, self._in_flight = self._in_flight, None
            plan = self.scheduler.schedule()
            if plan is not None:
                self._in_flight = self.runner.dispatch(plan)
                self._record_scheduled(self._in_flight)
            outputs = self._take_in(before) if before is not None else []
        except Exception as error:
            self._recover(error)
            return []
        self._failures = 0
        return outputs

    def shutdown(self) -> None:
        """Drops all requests and frees the device memory."""
        for request_id in list(self._groups):
            self.abort(request_id)
        self._in_flight = None
        self.runner.shutdown()

    def check_integrity(self) -> None:
        """Raises AssertionError where the books of requests, slots and pages disagree."""
        self.scheduler.check_integrity()

    def check(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises the RequestError that `add_request` would; reads nothing that steps change but the names in use."""
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", param="request_id")
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt has no tokens; give at least one", param="prompt")
        if len(prompt_token_ids) >= self.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(prompt_token_ids):,} tokens; this model holds {self.max_model_len:,} with the output. "
                "Shorten the prompt or raise max_model_len.",
                param="prompt",
            )
        given = {
            "prompt": prompt_token_ids,
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": list(params.logit_bias or ()),
        }
        for name, ids in given.items():
            if not (0 <= min(ids, default=0) and max(ids, default=0) < self.vocab_size):
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise InvalidRequestError(
                    f"{name} holds token id {wrong}; the vocabulary has ids 0 to {self.vocab_size - 1}", param=name
                )
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer; use stop_token_ids", param="stop")

    def _record_scheduled(self, step: InFlight) -> None:
        now = time.monotonic()
        for row in step.plan.rows:
            if row.request.scheduled_s is None:
                row.request.scheduled_s = now
            if row.num_tokens > 1:
                self.scheduler.record_computed_pages(row.request)

    def _take_in(self, step: InFlight) -> list[RequestOutput]:
        """Gives each sampled token to its request and collects what the users see."""
        results = self.runner.collect(step)
        now = time.monotonic()
        changed: dict[str, RequestGroup] = {}
        num_sampled = 0
        tokens = results["tokens"].tolist() if step.rows else []
        text = self.tokenizer.token_text if self.tokenizer is not None else lambda token_id: None
        for i, row in enumerate(step.rows):
            request = row.request
            if row.target != NO_TARGET:
                count = request.group.params.prompt_logprobs or 0
                request.prompt_logprobs[row.position] = token_logprobs(results, i, row.target, count, text)
                continue
            request.num_in_flight -= 1
            if not is_live(request):
                continue
            num_sampled += 1
            changed[request.group.request_id] = request.group
            self._record_token(request, now)
            if (beams := request.group.beams) is not None:
                for ended in beams.take(request, *likeliest(results, i, beams.num_candidates)):
                    self._finish(ended)
                continue
            wanted = request.group.params.logprobs
            logprobs = None if wanted is None else token_logprobs(results, i, tokens[i], wanted, text)
            if "logprob" in results:
                request.cumulative_logprob += float(results["logprob"][i])
            self._completions[request].append(tokens[i], logprobs)
            self._after_token(request)
        outputs = [output for group in changed.values() if (output := group_output(group, self._completions)) is not None]
        for group in changed.values():
            if group.finished:
                self._forget(group)
        self._record_step(step, num_sampled)
        return outputs

    def _after_token(self, request: Request) -> None:
        if request.finish_reason is not None:
            self._finish(request)
            return
        if len(request.token_ids) % self.scheduler.page_size == 0:
            self.scheduler.record_computed_pages(request)
        if request.needs_host and (bans := request.group.banned_next(request.output_token_ids)) != request.bans:
            request.bans = bans
            if request.is_placed:  # else the row is written when it gets a slot again
                self.runner.set_shaping(request)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell each bad word, at the start of a text and after a space."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise InvalidRequestError("bad_words need a tokenizer; use logit_bias", param="bad_words")
        words = [w for word in params.bad_words for w in (word.lstrip(), " " + word.lstrip())]
        ids = [tuple(self.tokenizer.encode(word, add_special_tokens=False)) for word in words]
        return tuple(dict.fromkeys(word for word in ids if word))

    def _finish(self, request: Request) -> None:
        self.scheduler.record_computed_pages(request)
        self.scheduler.finish(request)
        if self.observer is not None:
            self.observer.on_finished(_finished_stats(request, time.monotonic()))

    def _forget(self, group: RequestGroup) -> None:
        del self._groups[group.request_id]
        for request in group.requests:
            del self._completions[request]

    def _recover(self, error: Exception) -> None:
        """After a failed step: the state is lost, the requests are not; they are computed again."""
        self._failures += 1
        if self._failures > MAX_FAILURES:
            raise EngineDeadError(f"{self._failures} steps failed in a row; the last: {error}") from error
        log.exception("a step failed; its requests are computed again")
        self._in_flight = None
        self.scheduler.reset()
        self.runner.reset()

    def fail_all(self, error: str) -> list[RequestOutput]:
        """Ends every request with an error; for an engine that cannot go on."""
        outputs = []
        for group in list(self._groups.values()):
            for request in group.requests:
                if is_live(request):
                    self._completions[request].end("error")
                    self.scheduler.finish(request)
            output = group_output(group, self._completions, error)
            outputs += [output] if output is not None else []
            self._forget(group)
        return outputs

    # Reports

    def _record_token(self, request: Request, now: float) -> None:
        is_first = request.first_token_s is None
        since = request.group.arrival_s if request.last_token_s is None else request.last_token_s
        if is_first:
            request.first_token_s = now
        request.last_token_s = now
        if self.observer is not None:
            self.observer.on_tokens(TokenStats(is_first, now - since))

    def _record_step(self, step: InFlight, num_sampled: int) -> None:
        if self.observer is None:
            return
        scheduler, cache = self.scheduler, self.scheduler.prefix_cache
        stats = StepStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=scheduler.pool.num_held / scheduler.pool.num_pages,
            num_prompt_tokens=sum(row.num_tokens for row in step.plan.rows if row.start < row.request.num_prompt_tokens),
            num_generation_tokens=num_sampled,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=cache.queries if cache is not None else 0,
            prefix_hits=cache.hits if cache is not None else 0,
        )
        scheduler.num_preemptions = 0
        if cache is not None:
            cache.queries = cache.hits = 0
        self.observer.on_step(stats)


def _finished_stats(request: Request, now: float) -> FinishedStats:
    group, reason = request.group, request.finish_reason
    scheduled = request.scheduled_s or now
    first = request.first_token_s or now
    ended: FinishReason = "abort" if reason is None else reason
    return FinishedStats(
        finish_reason=ended,
        num_prompt_tokens=request.num_prompt_tokens,
        num_generation_tokens=request.num_output_tokens,
        num_cached_tokens=request.num_cached_tokens,
        max_tokens=group.params.max_tokens,
        n=group.params.n,
        e2e_s=now - group.arrival_s,
        queue_s=scheduled - group.arrival_s,
        prefill_s=first - scheduled,
        decode_s=now - first,
    )
