"""What both endpoints answer: the envelope, the usage, and how outputs become one JSON value or a stream of events."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from jaxserve.errors import JaxserveError
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


class Usage:
    """The tokens of one reply."""

    def __init__(self, batch: Batch) -> None:
        self._num_prompt = sum(map(len, batch.prompts))
        self._num_output = 0
        self._num_cached = [0] * len(batch.prompts)

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts an output that carries only what is new, or everything at once."""
        self._num_cached[prompt_index] = output.num_cached_tokens
        for completion in output.outputs:
            self._num_output += len(completion.token_ids)

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": self._num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached)},
        }


def new_request_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


class Reply:
    """The answer to one HTTP request: `whole`, or its `events`."""

    def __init__(self, batch: Batch, choices: ChoiceFormat, *, request_id: str, model: str, n: int) -> None:
        self._batch = batch
        self._choices = choices
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._n = n
        self._usage = Usage(batch)

    async def whole(self, object_name: str) -> dict[str, Any]:
        """The reply as one JSON value, from requests of OutputKind.FINAL_ONLY."""
        choices = []
        async with aclosing(self._batch.outputs()) as outputs:
            async for i, output in outputs:
                self._usage.add(i, output)
                choices += [self._choices.choice(i * self._n + c.index, c, output) for c in output.outputs]
        choices.sort(key=lambda choice: choice["index"])
        return {**self._head, "object": object_name, "choices": choices, "usage": self._usage.as_dict()}

    async def events(self, object_name: str, options: StreamOptions) -> AsyncGenerator[bytes]:
        """The reply as server-sent events, from requests of OutputKind.DELTA. An error becomes an event, too."""
        head = {**self._head, "object": object_name}
        if options.include_usage:
            head["usage"] = None  # OpenAI: null in every chunk but the last
        try:
            async with aclosing(self._batch.outputs()) as outputs:
                async for i, output in outputs:
                    self._usage.add(i, output)
                    if options.continuous_usage_stats:
                        head["usage"] = self._usage.as_dict()
                    chunks = [self._choices.chunk(i * self._n + c.index, c, output) for c in output.outputs]
                    if events := b"".join([encode_event({**head, "choices": [chunk]}) for chunk in chunks if chunk]):
                        yield events
            if options.include_usage:
                yield encode_event({**head, "choices": [], "usage": self._usage.as_dict()})
        except Exception as e:
            if not isinstance(e, JaxserveError):
                log.exception("a stream failed")
            yield encode_event(describe(e)[1])
        yield DONE
