"""A completion as Ollama writes it: one JSON value, or a line for each piece."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.outputs import CompletionOutput
from jaxserve.server.batch import Batch
from jaxserve.server.errors import describe
from jaxserve.server.reply import SingleReply
from jaxserve.server.wire import encode_line

log = logging.getLogger(__name__)

TextFields = Callable[[str], dict[str, Any]]


def as_message(text: str) -> dict[str, Any]:
    """Where /api/chat has the text."""
    return {"message": {"role": "assistant", "content": text}}


def as_response(text: str) -> dict[str, Any]:
    """Where /api/generate has it."""
    return {"response": text}


class OllamaReply:
    """The answer to one request."""

    def __init__(self, batch: Batch, model: str, text_fields: TextFields) -> None:
        self._reply = SingleReply(batch)
        self._model = model
        self._text_fields = text_fields
        self._started_ns = time.perf_counter_ns()
        self._first_ns: int | None = None
        self.abort = batch.abort

    async def whole(self) -> dict[str, Any]:
        """The completion as one JSON value."""
        completion = await self._reply.whole()
        return self._entry(completion.text) | self._ending(completion)

    async def lines(self) -> AsyncGenerator[bytes]:
        """The completion as JSON lines. An error becomes a line, too."""
        try:
            async with aclosing(self._reply.deltas()) as deltas:
                async for completion in deltas:
                    self._first_ns = self._first_ns or time.perf_counter_ns()
                    if completion.finished:
                        yield encode_line(self._entry(completion.text) | self._ending(completion))
                    elif completion.text:
                        yield encode_line(self._entry(completion.text) | {"done": False})
        except Exception as e:
            if not isinstance(e, JaxserveError):
                log.exception("a stream failed")
            yield encode_line(describe(e, "ollama")[1])

    def _entry(self, text: str) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self._model, "created_at": now, **self._text_fields(text)}

    def _ending(self, completion: CompletionOutput) -> dict[str, Any]:
        """The end, with times in nanoseconds. Without a stream nobody knows when the first token came."""
        now = time.perf_counter_ns()
        first = self._first_ns or self._started_ns
        return {
            "done": True,
            "done_reason": "length" if completion.finish_reason == "length" else "stop",
            "total_duration": now - self._started_ns,
            "load_duration": 0,
            "prompt_eval_count": self._reply.usage.num_prompt,
            "prompt_eval_duration": first - self._started_ns,
            "eval_count": self._reply.usage.num_output,
            "eval_duration": now - first,
        }
