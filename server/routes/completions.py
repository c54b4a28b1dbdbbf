"""POST /v1/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from jaxserve.server.batch import Batch
from jaxserve.server.logprobs import completion_logprobs
from jaxserve.server.protocol import CompletionRequest, StreamOptions
from jaxserve.server.reply import Reply, new_request_id
from jaxserve.server.serving import Serving
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer


def completions_router(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        serving.check_model(body.model)
        prompts = [(ids, serving.sampling_params(body, len(ids))) for ids in await serving.prompts(body)]
        echoes = await serving.prompt_texts(body) if body.echo else None
        request_id = new_request_id("cmpl")
        batch = Batch(serving.engine, prompts, request_id, body.priority)
        choices = CompletionChoices(serving.engine.tokenizer, body, serving.gives_token_ids(body), echoes)
        reply = Reply(batch, choices, request_id=request_id, model=serving.model_name, n=body.n)
        if body.stream:
            return EventStream(reply.events("text_completion", body.stream_options or StreamOptions()), batch.abort)
        try:
            return Json(await until_disconnect(request.receive, reply.whole("text_completion")))
        finally:
            batch.abort()

    return router


class CompletionChoices:
    """Completions as the completions endpoint writes them; each begins with its prompt where `echoes` has the texts."""

    def __init__(
        self, tokenizer: Tokenizer | None, body: CompletionRequest, gives_token_ids: bool, echoes: list[str] | None
    ) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = body.logprobs is not None
        self._gives_token_ids = gives_token_ids
        self._echoes = echoes
        self._n = body.n
        self._text_offsets: dict[int, int] = {}  # by choice; one that has begun is in it

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        echo = self._echoes[index // self._n] if self._echoes is not None and index not in self._text_offsets else None
        entry: dict[str, Any] = {
            "index": index,
            "text": (echo or "") + completion.text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
        }
        offset = self._text_offsets.setdefault(index, 0)
        if self._has_logprobs:
            token_ids = completion.token_ids
            positions: list[TokenLogprobs | None] = [*(completion.logprobs or ())]
            if echo is not None:
                token_ids, positions = output.prompt_token_ids + token_ids, [*(output.prompt_logprobs or ()), *positions]
            entry["logprobs"], self._text_offsets[index] = completion_logprobs(token_ids, positions, self._tokenizer, offset)
        if completion.finished:
            entry["stop_reason"] = completion.stop_reason
        if self._gives_token_ids:
            entry["token_ids"] = completion.token_ids
        return entry

    def chunk(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any] | None:
        says_more = completion.text or completion.finished or self._has_logprobs or self._gives_token_ids
        return self.choice(index, completion, output) if says_more else None
