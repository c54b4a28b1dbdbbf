"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.protocol import ChatRequest, StreamOptions
from jaxserve.server.reply import Reply, new_request_id
from jaxserve.server.route import JsonRoute
from jaxserve.server.serving import Serving, salt_of
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json


def chat_router(serving: Serving) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions, whole or streamed."""
        reply = await chat_reply(serving, body, salt_of(request))
        if body.stream:
            return EventStream(reply.events("chat.completion.chunk", body.stream_options or StreamOptions()), reply.abort)
        try:
            return Json(await until_disconnect(request.scope, reply.whole("chat.completion")))
        finally:
            reply.abort()

    return router


async def chat_reply(serving: Serving, body: ChatRequest, salt: str = "") -> Reply:
    """Submits a chat; the reply must be read to its end, or aborted."""
    batch = await serving.start_chat(body, new_request_id("chatcmpl"), salt)
    return Reply(batch, ChatChoices(serving, body), model=serving.model_name, n=body.n)


class ChatChoices:
    """Completions as the chat endpoint writes them."""

    def __init__(self, serving: Serving, body: ChatRequest) -> None:
        self._tokenizer = serving.engine.tokenizer
        self._num_logprobs = body.num_logprobs
        self._num_prompt_logprobs = body.prompt_logprobs
        self._gives_token_ids = serving.gives_token_ids(body)
        self._begun: set[int] = set()

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text}
        return self._entry(index, completion, "message", message)

    def chunk(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any] | None:
        delta = {"content": completion.text} if completion.text else {}
        if not delta and not completion.finished and self._num_logprobs is None and not self._gives_token_ids:
            return None
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": completion.text}
        return self._entry(index, completion, "delta", delta)

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._gives_token_ids:
            extras["prompt_token_ids"] = output.prompt_token_ids
        if self._num_prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(output, self._num_prompt_logprobs, self._tokenizer)
        return extras

    def _entry(self, index: int, completion: CompletionOutput, kind: str, message: dict[str, str]) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": index, kind: message, "logprobs": None, "finish_reason": completion.finish_reason}
        if self._num_logprobs is not None:
            entry["logprobs"] = chat_logprobs(completion, self._tokenizer, self._num_logprobs)
        if completion.finished:
            entry["stop_reason"] = completion.stop_reason
        if self._gives_token_ids:
            entry["token_ids"] = completion.token_ids
        return entry
