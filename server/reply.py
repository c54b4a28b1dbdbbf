"""What both endpoints answer: the envelope, the usage, and how outputs become one JSON value or a stream of events."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from jaxserve.errors import JaxserveError, RequestError
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.batch import Batch
from jaxserve.server.errors import describe
from jaxserve.server.protocol import StreamOptions
from jaxserve.server.wire import DONE, encode_event

log = logging.getLogger(__name__)


class ChoiceFormat(Protocol):
    """One endpoint's way to write a completion; lives as long as its reply."""

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        """A whole completion, one of `output`'s."""
        ...

    def chunk(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any] | None:
        """What is new of a completion, None where there is nothing to say."""
        ...

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """What stands beside the choices, in a whole reply and in a stream's first event."""
        ...


class Usage:
    """The tokens of one reply."""

    def __init__(self, batch: Batch) -> None:
        self.num_prompt = sum(map(len, batch.prompts))
        self.num_output = 0
        self._num_cached = [0] * len(batch.prompts)

    @property
    def num_cached(self) -> int:
        return sum(self._num_cached)

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts an output that carries only what is new, or everything at once."""
        self._num_cached[prompt_index] = output.num_cached_tokens
        for completion in output.outputs:
            self.num_output += len(completion.token_ids)

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_output,
            "total_tokens": self.num_prompt + self.num_output,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


def new_request_id(prefix: str) -> str:
    return f"{prefix}-{os.urandom(16).hex()}"


class SingleReply:
    """The answer to a request with one prompt and one completion, for the APIs that know no choices.

    Attributes:
        usage: the tokens so far.
    """

    def __init__(self, batch: Batch) -> None:
        self.usage = Usage(batch)
        self._batch = batch

    def abort(self) -> None:
        """Frees what the reply holds; harmless when it has ended."""
        self._batch.abort()

    async def whole(self) -> CompletionOutput:
        """The completion, from a request of OutputKind.FINAL_ONLY."""
        async for completion in self.deltas():
            if completion.finished:
                return completion
        raise RequestError("the request was stopped")

    async def deltas(self) -> AsyncGenerator[CompletionOutput]:
        """What is new, each time."""
        async with aclosing(self._batch.outputs()) as outputs:
            async for news in outputs:
                for i, output in news:
                    self.usage.add(i, output)
                    for completion in output.outputs:
                        yield completion


class Reply:
    """The answer to one HTTP request: `whole`, or its `events`."""

    def __init__(self, batch: Batch, choices: ChoiceFormat, *, model: str, n: int) -> None:
        self._batch = batch
        self._choices = choices
        self._head = {"id": batch.request_id, "created": int(time.time()), "model": model}
        self._n = n
        self._usage = Usage(batch)

    def abort(self) -> None:
        """Frees what the reply holds; harmless when it has ended."""
        self._batch.abort()

    async def whole(self, object_name: str) -> dict[str, Any]:
        """The reply as one JSON value, from requests of OutputKind.FINAL_ONLY."""
        choices, extras = [], {}
        async with aclosing(self._batch.outputs()) as outputs:
            async for news in outputs:
                for i, output in news:
                    self._usage.add(i, output)
                    choices += [self._choices.choice(i * self._n + c.index, c, output) for c in output.outputs]
                    extras = self._choices.extras(output)
        choices.sort(key=lambda choice: choice["index"])
        return {**self._head, "object": object_name, "choices": choices, "usage": self._usage.as_dict(), **extras}

    async def events(self, object_name: str, options: StreamOptions) -> AsyncGenerator[bytes]:
        """The reply as server-sent events, from requests of OutputKind.DELTA. An error becomes an event, too."""
        head = {**self._head, "object": object_name}
        if options.include_usage:
            head["usage"] = None  # OpenAI: null in every chunk but the last
        extras: dict[str, Any] | None = None
        try:
            async with aclosing(self._batch.outputs()) as outputs:
                async for news in outputs:
                    events = []
                    for i, output in news:
                        self._usage.add(i, output)
                        if extras is None:
                            extras = self._choices.extras(output)
                        if options.continuous_usage_stats:
                            head["usage"] = self._usage.as_dict()
                        for c in output.outputs:
                            if chunk := self._choices.chunk(i * self._n + c.index, c, output):
                                events.append(encode_event({**head, "choices": [chunk], **extras}))
                                extras = {}
                    if events:
                        yield b"".join(events)
            if options.include_usage:
                yield encode_event({**head, "choices": [], "usage": self._usage.as_dict()})
        except Exception as e:
            if not isinstance(e, JaxserveError):
                log.exception("a stream failed")
            yield encode_event(describe(e)[1])
        yield DONE
