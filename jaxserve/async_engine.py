"""AsyncEngine: one thread drives the engine; each request is an asyncio stream of its outputs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from jaxserve import uncollected
from jaxserve.admission import Admission
from jaxserve.config import EngineConfig
from jaxserve.devices import expect_devices
from jaxserve.engine import Engine
from jaxserve.errors import EngineDeadError, InvalidRequestError, RequestError
from jaxserve.metrics import Observer
from jaxserve.outputs import RequestOutput
from jaxserve.replicas import Replicas
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.compiling import Progress
    from jaxserve.startup import MakeRunner
    from jaxserve.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class RequestStream:
    """The outputs of one request, as they come; ends after the finished one."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop, abort: Callable[[RequestStream], None]) -> None:
        self.request_id = request_id
        self.loop = loop
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._abort = abort
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        output = await self._queue.get()
        self._ended = output.finished
        return output

    def more(self) -> Iterator[RequestOutput]:
        """What has come already; does not wait."""
        while not (self._ended or self._queue.empty()):
            output = self._queue.get_nowait()
            self._ended = output.finished
            yield output

    def put(self, output: RequestOutput) -> None:
        """Called on the stream's event loop."""
        self._queue.put_nowait(output)

    def abort(self) -> None:
        """Ends the request and frees its pages before the next step is planned. May be called at any time, and again."""
        if not self._ended:
            self._ended = True
            self._abort(self)


class AsyncEngine:
    """An Engine on a thread of its own.

    Requests and aborts reach the thread between two steps, through a queue of calls.
    """

    def __init__(self, engine: Engine | Replicas) -> None:
        self.engine = engine
        self._wake = threading.Condition()  # guards what follows
        self._admission = Admission(engine.config.scheduler)
        self._streams: dict[str, RequestStream] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._updates: set[Future[int]] = set()  # of the weights, that are waited for
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._dead: str | None = None
        self._busy_since: float | None = None  # time.monotonic() when the thread's present step began

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        observer: Observer | None = None,
        on_progress: Progress | None = None,
        make_runner: MakeRunner | None = None,
    ) -> Self:
        """Loads and compiles; blocks until the engine is ready."""
        expect_devices()
        with uncollected():  # meanwhile, as it takes a second
            from jaxserve.startup import build_engine
        return cls(build_engine(config, observer=observer, on_progress=on_progress, make_runner=make_runner))

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    @property
    def default_sampling(self) -> dict[str, Any]:
        return self.engine.default_sampling

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be served."""
        return self._dead is None and self._thread is not None and self._thread.is_alive()

    @property
    def stalled_s(self) -> float:
        """For how many seconds the present step has been running; 0 while there is nothing to do."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def give_up(self, reason: str) -> None:
        """Ends every stream with an error and refuses new requests, though the thread hangs in a step. It is left behind."""
        log.error("the engine is given up: %s", reason)
        self._thread = None
        self._fail(reason)

    @property
    def cause(self) -> str | None:
        """Why requests can no longer be served."""
        return self._dead

    def describe(self) -> dict[str, str]:
        """What start-up prints about the model and its pool."""
        return self.engine.description

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def shutdown(self) -> None:
        """Stops the thread, ends all streams and frees the device memory."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._busy_since is not None and self._thread is None:
            return  # given up: the engine's state is the hanging step's
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.engine.shutdown()

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        continues_text: bool = True,
    ) -> RequestStream:
        """Queues a prompt. Must be called on an event loop, where the stream's outputs then arrive.

        Args:
            priority: the smaller, the sooner it runs, under scheduling_policy "priority".
            cache_salt, continues_text: see Engine.add_request.

        Raises:
            InvalidRequestError, PromptTooLongError: at once.
            QueueFullError: max_num_queued_reqs or max_num_queued_tokens is reached.
            EngineDeadError: the engine has stopped.
        """
        request_id = uuid.uuid4().hex if request_id is None else request_id
        self.engine.check(request_id, prompt_token_ids, params, priority)
        stream = RequestStream(request_id, asyncio.get_running_loop(), self._abort)
        options: dict[str, Any] = {"priority": priority, "cache_salt": cache_salt, "continues_text": continues_text}

        def add() -> None:
            if request_id not in self._streams:
                return  # aborted before it began
            try:
                self.engine.add_request(prompt_token_ids, params, request_id=request_id, prompt=prompt, **options)
            except Exception as error:  # one request's trouble must not end the others
                log.exception("request %s cannot be taken in", request_id)
                text = str(error) if isinstance(error, RequestError) else "internal error; the log has the details"
                self._deliver([RequestOutput(request_id, prompt, prompt_token_ids, finished=True, error=text)])

        with self._wake:
            if not self.is_healthy:
                raise self._has_stopped()
            if request_id in self._streams:
                raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", param="request_id")
            self._admission.enter(request_id, params.num_samples, len(prompt_token_ids))
            self._streams[request_id] = stream
            self._calls.append(add)
            self._wake.notify()
        return stream

    async def update_params(self, tree: Any) -> int:
        """Swaps the weights between two steps, while requests run. See Engine.update_params.

        Raises:
            WeightsError: the tree is not of the model's form; nothing has changed then.
            EngineDeadError: the engine has stopped.
        """
        update: Future[int] = Future()
        update.add_done_callback(self._updates.discard)

        def call() -> None:
            if not update.set_running_or_notify_cancel():
                return
            try:
                version = self.engine.update_params(tree)
            except Exception as error:  # noqa: BLE001  the caller's to know; the requests go on
                update.set_exception(error)
            else:
                update.set_result(version)

        with self._wake:
            if not self.is_healthy:
                raise self._has_stopped()
            self._updates.add(update)
            self._calls.append(call)
            self._wake.notify()
        return await asyncio.wrap_future(update)

    def _has_stopped(self) -> EngineDeadError:
        return EngineDeadError(f"the engine has stopped{f': {self._dead}' if self._dead else ''}. Restart the server.")

    def _abort(self, stream: RequestStream) -> None:
        request_id = stream.request_id
        with self._wake:
            if self._streams.get(request_id) is stream:  # else it has ended, and the id may be another's
                del self._streams[request_id]
                self._admission.leave(request_id)
                self._calls.append(lambda: self.engine.abort(request_id))
                self._wake.notify()

    # On the engine's thread

    def _run(self) -> None:
        reason = "the engine is shut down"
        try:
            while self._wait_for_work():
                self._busy_since = time.monotonic()
                for _ in range(len(self._calls)):  # not until there are none: more may come for ever
                    self._calls.popleft()()
                if self.engine.has_work:
                    self._deliver(self.engine.step())
                self._busy_since = None
        except BaseException as error:
            log.exception("the engine has stopped")
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._end(reason)

    def _wait_for_work(self) -> bool:
        """Sleeps until there is something to do; False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._calls or self.engine.has_work)
            return not self._stopping

    def _end(self, reason: str) -> None:
        """Refuses requests from now on, and ends every stream: with what the engine has of it, or with nothing."""
        with self._wake:
            self._dead = self._dead or reason
            self._calls.clear()
        try:
            self._deliver(self.engine.fail_all(reason))
        except Exception:
            log.exception("the engine cannot say what its requests have got")
        self._busy_since = None
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        with self._wake:
            self._dead = self._dead or reason
        for update in list(self._updates):
            with suppress(InvalidStateError):  # it has just ended
                update.set_exception(self._has_stopped())
        self._deliver([RequestOutput(name, None, [], finished=True, error=reason) for name in list(self._streams)])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hands outputs to their streams, with one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, RequestOutput]]] = {}
        with self._wake:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    by_loop.setdefault(stream.loop, []).append((stream, output))
                if output.finished:
                    self._streams.pop(output.request_id, None)
                    self._admission.leave(output.request_id)
            for request_id in self.engine.answered:
                self._admission.answer(request_id)
        for loop, items in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: list[tuple[RequestStream, RequestOutput]]) -> None:
    for stream, output in items:
        stream.put(output)
