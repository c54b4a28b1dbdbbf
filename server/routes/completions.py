"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from jaxserve.server.logprobs import completion_logprobs, prompt_logprobs
from jaxserve.server.protocol import CompletionRequest, StreamOptions
from jaxserve.server.reply import Reply, new_request_id
from jaxserve.server.route import JsonRoute
from jaxserve.server.serving import Serving, salt_of
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json


def completions_router(serving: Serving) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """OpenAI's completions of texts or token ids, whole or streamed."""
        reply = await completion_reply(serving, body, salt_of(request))
        if body.stream:
            return EventStream(reply.events("text_completion", body.stream_options or StreamOptions()), reply.abort)
        try:
            return Json(await until_disconnect(request.scope, reply.whole("text_completion")))
        finally:
            reply.abort()

    return router


async def completion_reply(serving: Serving, body: CompletionRequest, salt: str = "") -> Reply:
    """Submits prompts; the reply must be read to its end, or aborted."""
    serving.check_model(body.model)
    echoes = await serving.prompt_texts(body) if body.echo else None
    batch = await serving.start_completion(body, new_request_id("cmpl"), salt)
    return Reply(batch, CompletionChoices(serving, body, echoes), model=serving.model_name, n=body.n)


class CompletionChoices:
    """Completions as the completions endpoint writes them; each begins with its prompt where `echoes` has the texts."""

    def __init__(self, serving: Serving, body: CompletionRequest, echoes: list[str] | None) -> None:
        self._tokenizer = serving.engine.tokenizer
        self._num_logprobs = body.logprobs
        self._num_prompt_logprobs = body.prompt_logprobs
        self._gives_token_ids = serving.gives_token_ids(body)
        self._echoes = echoes
        self._n = body.n
        self._text_offsets: dict[int, int] = {}  # by choice; one that has begun is in it

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        begins = index not in self._text_offsets
        echo = self._echoes[index // self._n] if self._echoes is not None and begins else None
        entry: dict[str, Any] = {
            "index": index,
            "text": (echo or "") + completion.text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
        }
        offset = self._text_offsets.setdefault(index, 0)
        if self._num_logprobs is not None:
            token_ids = completion.token_ids
            positions: list[TokenLogprobs | None] = [*(completion.logprobs or ())]
            if echo is not None:
                token_ids, positions = output.prompt_token_ids + token_ids, [*(output.prompt_logprobs or ()), *positions]
            entry["logprobs"], self._text_offsets[index] = completion_logprobs(
                token_ids, positions, self._tokenizer, offset, self._num_logprobs
            )
        if completion.finished:
            entry["stop_reason"] = completion.stop_reason
        if self._gives_token_ids:
            entry["token_ids"] = completion.token_ids
            if begins:
                entry["prompt_token_ids"] = output.prompt_token_ids
        if self._num_prompt_logprobs is not None:
            entry["prompt_logprobs"] = prompt_logprobs(output, self._num_prompt_logprobs, self._tokenizer)
        return entry

    def chunk(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any] | None:
        says_more = completion.text or completion.finished or self._num_logprobs is not None or self._gives_token_ids
        return self.choice(index, completion, output) if says_more else None

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        return {}
