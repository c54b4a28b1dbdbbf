"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.batch import Batch
from jaxserve.server.logprobs import chat_logprobs
from jaxserve.server.protocol import ChatRequest, StreamOptions
from jaxserve.server.reply import Reply, new_request_id
from jaxserve.server.serving import Serving
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer


def chat_router(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        serving.check_model(body.model)
        token_ids = await serving.chat_prompt(body)
        params = serving.sampling_params(body, len(token_ids))
        request_id = new_request_id("chatcmpl")
        batch = Batch(serving.engine, [(token_ids, params)], request_id, body.priority)
        choices = ChatChoices(serving.engine.tokenizer, body.num_logprobs, serving.gives_token_ids(body))
        reply = Reply(batch, choices, request_id=request_id, model=serving.model_name, n=body.n)
        if body.stream:
            return EventStream(reply.events("chat.completion.chunk", body.stream_options or StreamOptions()), batch.abort)
        try:
            return Json(await until_disconnect(request.receive, reply.whole("chat.completion")))
        finally:
            batch.abort()

    return router


class ChatChoices:
    """Completions as the chat endpoint writes them."""

    def __init__(self, tokenizer: Tokenizer | None, num_logprobs: int | None, gives_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs
        self._gives_token_ids = gives_token_ids
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

    def _entry(self, index: int, completion: CompletionOutput, kind: str, message: dict[str, str]) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": index, kind: message, "logprobs": None, "finish_reason": completion.finish_reason}
        if self._num_logprobs is not None:
            entry["logprobs"] = chat_logprobs(completion, self._tokenizer, self._num_logprobs)
        if completion.finished:
            entry["stop_reason"] = completion.stop_reason
        if self._gives_token_ids:
            entry["token_ids"] = completion.token_ids
        return entry
