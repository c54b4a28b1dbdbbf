"""A completion as the Responses API writes it: one JSON value, or typed events."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.outputs import CompletionOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.batch import Batch
from jaxserve.server.errors import describe
from jaxserve.server.logprobs import chat_logprobs
from jaxserve.server.reply import SingleReply, Usage, new_request_id
from jaxserve.server.responses.protocol import ResponsesRequest
from jaxserve.server.serving import Serving
from jaxserve.server.wire import encode_named_event

log = logging.getLogger(__name__)


class ResponsesReply:
    """The answer to one request.

    Attributes:
        body: the response as it is now.
        text: the output so far.
    """

    def __init__(self, serving: Serving, batch: Batch, params: SamplingParams, request: ResponsesRequest) -> None:
        self._reply = SingleReply(batch)
        self._tokenizer = serving.engine.tokenizer
        self._num_logprobs = (request.top_logprobs or 0) if request.wants_logprobs else None
        self._message_id = new_request_id("msg")
        self._logprobs: list[dict[str, Any]] = []
        self._num_events = 0
        self.text = ""
        self.body = _new_body(batch.request_id, serving.model_name, params, request)
        self.abort = batch.abort

    async def whole(self) -> dict[str, Any]:
        """The response as one JSON value."""
        self._take(await self._reply.whole())
        return self.body

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as typed events. An error becomes a failed response."""
        where = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self.body) + self._event("response.in_progress", response=self.body)
        item = self._message("in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **where, part=_part("", []))
        try:
            async with aclosing(self._reply.deltas()) as deltas:
                async for completion in deltas:
                    logprobs = self._take(completion)
                    if completion.text or logprobs:
                        yield self._event("response.output_text.delta", **where, delta=completion.text, logprobs=logprobs)
                    if completion.finished:
                        part = _part(self.text, self._logprobs)
                        yield self._event("response.output_text.done", **where, text=self.text, logprobs=self._logprobs)
                        yield self._event("response.content_part.done", **where, part=part)
                        yield self._event("response.output_item.done", output_index=0, item=self.body["output"][0])
                        yield self._event(f"response.{self.body['status']}", response=self.body)
        except Exception as e:
            if not isinstance(e, JaxserveError):
                log.exception("a stream failed")
            self.fail(e)
            yield self._event("response.failed", response=self.body)

    def fail(self, error: Exception) -> None:
        """Ends the response with an error."""
        self.body |= {"status": "failed", "error": {"code": "server_error", "message": describe(error)[1]["error"]["message"]}}

    def _take(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """Adds what is new, and returns its logprobs."""
        self.text += completion.text
        logprobs: list[dict[str, Any]] = []
        if self._num_logprobs is not None:
            logprobs = chat_logprobs(completion, self._tokenizer, self._num_logprobs)["content"]
            self._logprobs += logprobs
        if completion.finished:
            is_cut = completion.finish_reason == "length"
            self.body |= {
                "status": "incomplete" if is_cut else "completed",
                "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
                "usage": _usage(self._reply.usage),
            }
            self.body["output"] = [self._message(self.body["status"])]
        return logprobs

    def _message(self, status: str) -> dict[str, Any]:
        content = [_part(self.text, self._logprobs)]
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._num_events += 1
        return encode_named_event({"type": kind, "sequence_number": self._num_events - 1, **fields})


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt + usage.num_output,
    }


def _new_body(request_id: str, model: str, params: SamplingParams, request: ResponsesRequest) -> dict[str, Any]:
    return {
        "id": request_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": request.background,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "store": request.store,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": request.tool_choice,
        "tools": [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": request.truncation,
        "usage": None,
        "user": request.user,
    }
