"""The app of a FastChat worker: streams of JSON values that end in NUL, each with the whole text so far."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.responses import Response

from jaxserve.errors import InvalidRequestError, JaxserveError, PromptTooLongError, QueueFullError
from jaxserve.outputs import CompletionOutput
from jaxserve.server.batch import Batch
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import add_error_handlers, describe
from jaxserve.server.fastchat.conversation import read_messages, template
from jaxserve.server.middleware.body import BodyLimits
from jaxserve.server.protocol import MAX_WORDS, ChatRequest, CompletionRequest, Text, as_list
from jaxserve.server.reply import SingleReply, new_request_id
from jaxserve.server.serving import Serving
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json, encode_line

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine

log = logging.getLogger(__name__)

# fastchat.constants.ErrorCode
_CODES: dict[type[BaseException], int] = {
    InvalidRequestError: 40302, PromptTooLongError: 40303, QueueFullError: 42903, BaseException: 50001,
}  # fmt: skip


class GenerateParams(BaseModel):
    """What a front asks. It sends more than a worker needs (the model's name, its own settings), hence no refusal of the rest."""

    model_config = ConfigDict(extra="ignore")

    prompt: Text
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = 256
    stop: Annotated[list[Text], BeforeValidator(as_list), Field(max_length=MAX_WORDS)] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_WORDS)
    echo: bool = True

    def as_request(self) -> ChatRequest | CompletionRequest:
        names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids")
        fields = {name: getattr(self, name) for name in names} | {"stop": [stop for stop in self.stop or () if stop]}
        fields |= {"temperature": max(self.temperature, 0.0), "top_p": min(max(self.top_p, 1e-5), 1.0), "top_k": self.top_k}
        fields |= {"max_tokens": self.max_new_tokens, "stream": True}
        messages = read_messages(self.prompt)
        if messages is None:
            return CompletionRequest.model_validate(fields | {"prompt": self.prompt})
        return ChatRequest.model_validate(fields | {"messages": messages})


class CountParams(BaseModel):
    """A prompt whose tokens are to be counted."""

    prompt: Text


class Worker:
    """The engine as FastChat sees it."""

    def __init__(self, engine: AsyncEngine, names: Sequence[str]) -> None:
        self.serving = Serving(engine)
        self.names = list(names) or [self.serving.model_name]
        self.num_requests = 0

    def status(self) -> dict[str, Any]:
        return {"model_names": self.names, "speed": 1, "queue_length": self.num_requests}

    async def count(self, prompt: str) -> int:
        messages = read_messages(prompt)
        if messages is None:
            (tokens,) = await self.serving.encode([prompt], add_special_tokens=True)
            return len(tokens)
        return len(await self.serving.chat_prompt(ChatRequest.model_validate({"messages": messages})))

    async def values(self, params: GenerateParams) -> AsyncGenerator[dict[str, Any]]:
        """The text as it grows. An error is a value, too."""
        batch: Batch | None = None
        self.num_requests += 1
        try:
            batch = await self._start(params)
            reply, text = SingleReply(batch), params.prompt if params.echo else ""
            async with aclosing(reply.deltas()) as deltas:
                async for completion in deltas:
                    text += completion.text
                    if completion.finished:  # a front shows either new text or the end
                        yield _value(text, reply, None)
                    yield _value(text, reply, completion)
        except Exception as e:
            if not isinstance(e, JaxserveError):
                log.exception("a request failed")
            code = next(_CODES[cls] for cls in type(e).__mro__ if cls in _CODES)
            yield {"text": describe(e)[1]["error"]["message"], "error_code": code}
        finally:
            self.num_requests -= 1
            if batch is not None:
                batch.abort()

    async def _start(self, params: GenerateParams) -> Batch:
        request, name = params.as_request(), new_request_id("fastchat")
        if isinstance(request, ChatRequest):
            return await self.serving.start_chat(request, name)
        return await self.serving.start_completion(request, name)


def _value(text: str, reply: SingleReply, completion: CompletionOutput | None) -> dict[str, Any]:
    reason = completion.finish_reason if completion is not None else None
    return {"text": text, "error_code": 0, "usage": reply.usage.as_dict(), "finish_reason": reason}


def create_worker(engine: AsyncEngine, worker: Worker, config: ServerConfig) -> FastAPI:
    """The worker's app. Like FastChat's own workers it asks for no key: it belongs on a network of its own."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            worker.serving.close()
            await asyncio.to_thread(engine.shutdown)

    app = FastAPI(title="jaxserve FastChat worker", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    app.include_router(_router(worker))
    limits: dict[str, Any] = {"max_bytes": config.max_body_bytes, "max_json_depth": config.max_json_depth}
    app.add_middleware(BodyLimits, **limits)
    return app


def _router(worker: Worker) -> APIRouter:
    router = APIRouter()

    @router.post("/worker_generate_stream")
    async def generate_stream(params: GenerateParams) -> Response:
        async def chunks() -> AsyncGenerator[bytes]:
            async with aclosing(worker.values(params)) as values:
                async for value in values:
                    yield encode_line(value)[:-1] + b"\0"

        return EventStream(chunks(), lambda: None, media_type="application/octet-stream")

    @router.post("/worker_generate")
    async def generate(params: GenerateParams, request: Request) -> Response:
        async def last() -> dict[str, Any]:
            value: dict[str, Any] = {}
            async with aclosing(worker.values(params)) as values:
                async for value in values:  # noqa: B007  the last one is the answer
                    pass
            return value

        return Json(await until_disconnect(request.scope, last()))

    @router.post("/worker_get_status")
    async def get_status() -> Response:
        return Json(worker.status())

    @router.post("/count_token")
    async def count_token(params: CountParams) -> Response:
        return Json({"count": await worker.count(params.prompt), "error_code": 0})

    @router.post("/worker_get_conv_template")
    async def get_conv_template() -> Response:
        return Json({"conv": template()})

    @router.post("/model_details")
    async def model_details() -> Response:
        return Json({"context_length": worker.serving.max_model_len})

    return router
