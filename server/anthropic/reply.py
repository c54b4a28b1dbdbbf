"""A completion as Anthropic's Messages API writes it: one JSON value, or typed events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.outputs import CompletionOutput
from jaxserve.server.batch import Batch
from jaxserve.server.errors import describe
from jaxserve.server.reply import SingleReply
from jaxserve.server.wire import encode_named_event

log = logging.getLogger(__name__)

_PING = encode_named_event({"type": "ping"})


class MessageReply:
    """The answer to one request."""

    def __init__(self, batch: Batch, model: str) -> None:
        self._reply = SingleReply(batch)
        self._head: dict[str, Any] = {"id": batch.request_id, "type": "message", "role": "assistant", "model": model}
        self.abort = batch.abort

    async def whole(self) -> dict[str, Any]:
        """The message as one JSON value."""
        completion = await self._reply.whole()
        content = [{"type": "text", "text": completion.text}] if completion.text else []
        return {**self._head, "content": content, **_ending(completion), "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The message as typed events. An error becomes an event, too."""
        start = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
        yield encode_named_event({"type": "message_start", "message": start})
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        yield encode_named_event(block) + _PING
        try:
            async with aclosing(self._reply.deltas()) as deltas:
                async for completion in deltas:
                    if completion.text:
                        delta = {"type": "text_delta", "text": completion.text}
                        yield encode_named_event({"type": "content_block_delta", "index": 0, "delta": delta})
                    if completion.finished:
                        yield encode_named_event({"type": "content_block_stop", "index": 0})
                        end = {"type": "message_delta", "delta": _ending(completion), "usage": self._usage()}
                        yield encode_named_event(end) + encode_named_event({"type": "message_stop"})
        except Exception as e:
            if not isinstance(e, JaxserveError):
                log.exception("a stream failed")
            yield encode_named_event(describe(e, "anthropic")[1])

    def _usage(self) -> dict[str, int]:
        usage = self._reply.usage
        return {
            "input_tokens": usage.num_prompt - usage.num_cached,
            "cache_read_input_tokens": usage.num_cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.num_output,
        }


def _ending(completion: CompletionOutput) -> dict[str, Any]:
    if completion.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(completion.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}
