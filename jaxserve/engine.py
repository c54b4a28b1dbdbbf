"""The engine's loop: schedule and dispatch the next step while the one before runs, then collect that one. No HTTP, no threads.

The host learns of a request's end one step late. The token of that extra step is dropped and counts nowhere.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxserve.beam_search import BeamSearch
from jaxserve.completion import Completion, group_output, is_live
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDeadError, InvalidRequestError
from jaxserve.failures import Failures
from jaxserve.intake import Intake
from jaxserve.metrics import Observer
from jaxserve.outputs import RequestOutput
from jaxserve.reporter import Reporter
from jaxserve.request import Request, RequestGroup
from jaxserve.request_builder import RequestBuilder
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step import Weights
from jaxserve.step_runner import InFlight, StepRunner
from jaxserve.weight_store import WeightStore

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """Serves requests by continuous batching. Single-threaded: every method is called from one thread.

    Attributes:
        weights: what the runner runs with; none where it only pretends to run.
        config: resolved: nothing is None that the engine needs.
        default_sampling: the model's own sampling defaults.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        runner: StepRunner,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        weights: WeightStore | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        default_sampling: dict[str, Any] | None = None,
        description: dict[str, str] | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.weights = weights if weights is not None else WeightStore((), (), ())
        self.vocab_size = vocab_size
        self.default_sampling = default_sampling or {}
        self.description = description or {}
        self._clock = clock
        self._groups: dict[str, RequestGroup] = {}
        self._completions: dict[Request, Completion] = {}
        self._intake = Intake(scheduler, runner, self._completions, tokenizer, Reporter(observer, clock), clock)
        self._before: InFlight | None = None  # the step before the one in flight, while it is not collected
        self._in_flight: InFlight | None = None
        self._failures = Failures()
        self._dead: EngineDeadError | None = None
        self._builder = RequestBuilder(self.max_model_len, vocab_size, eos_token_ids, tokenizer, config.scheduler)
        self._order = itertools.count()
        self._names = itertools.count()
        self._seeds = np.random.default_rng(config.model.seed)

    @property
    def max_model_len(self) -> int:
        assert self.config.model.max_model_len is not None
        return self.config.model.max_model_len

    @property
    def answered(self) -> list[str]:
        """Ids of the requests whose first token came with the last `collect`."""
        return self._intake.answered

    @property
    def has_work(self) -> bool:
        return bool(self._groups) or self._in_flight is not None or self._before is not None

    @property
    def is_ready(self) -> bool:
        """Whether `collect` would not wait for the device."""
        return self._before is None or self.runner.is_ready(self._before)

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        continues_text: bool = True,
    ) -> str:
        """Queues a prompt; its outputs come from later calls of `step`.

        Args:
            cache_salt: prompts of different salts share no cached pages.
            continues_text: whether the output goes on with the prompt's text; else, as in a chat, it is a text of its own,
                whose first space some tokenizers drop.

        Returns:
            The request's id.

        Raises:
            InvalidRequestError: a parameter or token id is out of range, or priorities are not in use.
            PromptTooLongError: the prompt leaves no room for an output token.
        """
        request_id = f"request-{next(self._names)}" if request_id is None else request_id
        self.check(request_id, prompt_token_ids, params, priority)
        group = self._builder.build(
            request_id,
            prompt_token_ids,
            params,
            prompt,
            cache_salt=cache_salt,
            continues_text=continues_text,
            arrival_s=self._clock(),
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
                self._completions[request].cut_off("abort")
                self._intake.finish(request)
        self._forget(group)

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step and takes in the results of the one before.

        Returns:
            One output for each request that has something to show.

        Raises:
            EngineDeadError: steps failed repeatedly; the cause is chained.
        """
        self.dispatch()
        return self.collect()

    def dispatch(self) -> None:
        """The first half of a step: sends it on its way, if no more than one is under way."""
        if self._dead is not None:
            raise self._dead
        if self._before is not None:
            return
        try:
            self._before, self._in_flight = self._in_flight, None
            plan = self.scheduler.schedule()
            if plan is not None:
                self._in_flight = self.runner.dispatch(plan)
                self._record_scheduled(self._in_flight)
        except Exception as error:  # noqa: BLE001  whatever it is, it is chained when the engine gives up
            self._recover(error)

    def collect(self) -> list[RequestOutput]:
        """The second half of a step: waits for the step before the one that was dispatched last, and takes in its results."""
        self._intake.answered.clear()
        before, self._before = self._before, None
        if before is None:
            return []
        try:
            outputs = self._take_in(before)
        except Exception as error:  # noqa: BLE001  whatever it is, it is chained when the engine gives up
            self._recover(error)
            return []
        self._failures.record_success()
        return outputs

    @property
    def params(self) -> dict[str, jax.Array]:
        """The weights in use, by name: the engine's own arrays. On a CPU those of matmuls are [*out, *in], elsewhere [*in, *out]."""
        return self.weights.tree

    def update_params(self, tree: Any) -> int:
        """Goes on with other weights, without a copy of arrays that already lie as the engine's do.

        A step under way ends with the weights it began with. The prefix cache is emptied, and running requests are computed
        again: each token comes from one version alone.

        Args:
            tree: see WeightStore.place. The engine uses these very arrays, and does not delete them: neither may others,
                and none may be donated, while they are in use.

        Returns:
            The version of the weights, which outputs carry: 0 at first, and one more for each call.

        Raises:
            WeightsError: the tree is not of the model's form; nothing has changed then.
        """
        return self.use_weights(self.weights.place(tree))

    def use_weights(self, weights: Weights) -> int:
        """As update_params, from what WeightStore.place gives."""
        self.scheduler.recompute()
        return self.weights.replace(weights)

    def shutdown(self) -> None:
        """Drops all requests and frees the device memory."""
        for request_id in list(self._groups):
            self.abort(request_id)
        self._before = self._in_flight = None
        self.runner.shutdown()

    def check_integrity(self) -> None:
        """Raises AssertionError where the books of requests, slots and pages disagree."""
        self.scheduler.check_integrity()

    def check(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int = 0) -> None:
        """Raises the RequestError that `add_request` would; reads nothing that steps change but the names in use."""
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", param="request_id")
        self._builder.check(prompt_token_ids, params, priority)

    def _record_scheduled(self, step: InFlight) -> None:
        now = self._clock()
        for row in step.plan.rows:
            if row.request.scheduled_s is None:
                row.request.scheduled_s = now
            if row.num_tokens > 1:
                self.scheduler.record_computed_pages(row.request)

    def _take_in(self, step: InFlight) -> list[RequestOutput]:
        """Gives each sampled token to its request and collects what the users see."""
        changed = self._intake.take(step)
        found = [group_output(group, self._completions, step.weight_version) for group in changed.values()]
        outputs = [output for output in found if output is not None]
        for output in outputs:
            if output.finished:
                self._forget(self._groups[output.request_id])
        return outputs

    def _forget(self, group: RequestGroup) -> None:
        del self._groups[group.request_id]
        for request in group.requests:
            del self._completions[request]

    def _recover(self, error: Exception) -> None:
        """After a failed step: the state is lost, the requests are not; they are computed again."""
        if (too_many := self._failures.record_failure()) is not None:
            self._dead = EngineDeadError(f"{too_many}; the last: {error}")
            raise self._dead from error
        log.exception("a step failed; its requests are computed again")
        self._before = self._in_flight = None
        self.scheduler.reset()
        try:
            self.runner.reset()
        except Exception as again:  # noqa: BLE001  the second failure in a row
            self._recover(again)

    def fail_all(self, error: str) -> list[RequestOutput]:
        """Ends every request with an error; for an engine that cannot go on."""
        outputs = []
        for group in list(self._groups.values()):
            for request in group.requests:
                if is_live(request):
                    self._completions[request].cut_off("error")
                    self.scheduler.finish(request)
            group.error = error
            output = group_output(group, self._completions, self.weights.version)
            outputs += [output] if output is not None else []
            self._forget(group)
        return outputs
