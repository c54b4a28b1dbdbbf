"""POST /api/chat, /api/generate and /api/show, GET /api/tags, /api/ps and /api/version: Ollama's API."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.errors import InvalidRequestError
from jaxserve.server.batch import Batch
from jaxserve.server.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest, Options, ShowRequest
from jaxserve.server.ollama.reply import OllamaReply, TextFields, as_message, as_response
from jaxserve.server.protocol import ChatRequest
from jaxserve.server.reply import new_request_id
from jaxserve.server.route import JsonRoute
from jaxserve.server.serving import Serving, salt_of
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json


def ollama_router(serving: Serving) -> APIRouter:
    # Ollama's own server takes a body without a type, and some of its clients rely on that.
    router = APIRouter(route_class=JsonRoute, strict_content_type=False)
    card = _card(serving)

    @router.post("/api/chat")
    async def ollama_chat(body: OllamaChatRequest, request: Request) -> Response:
        """Ollama's chat, streamed if not told otherwise."""
        _check(serving, body.model, body.options)
        batch = await serving.start_chat(body.as_chat(), new_request_id("ollama"), salt_of(request))
        return await _answer(request, batch, body.model, as_message, body.stream)

    @router.post("/api/generate")
    async def ollama_generate(body: OllamaGenerateRequest, request: Request) -> Response:
        """Ollama's completion of one prompt, through the chat template if it is not raw."""
        _check(serving, body.model, body.options)
        wanted, request_id = body.as_request(), new_request_id("ollama")
        if isinstance(wanted, ChatRequest):
            batch = await serving.start_chat(wanted, request_id, salt_of(request))
        else:
            batch = await serving.start_completion(wanted, request_id, salt_of(request))
        return await _answer(request, batch, body.model, as_response, body.stream)

    @router.get("/api/tags")
    async def ollama_tags() -> Response:
        """Ollama's list of models."""
        return Json({"models": [card]})

    @router.get("/api/ps")
    async def ollama_ps() -> Response:
        """Ollama's list of loaded models."""
        return Json({"models": [card | {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}]})

    @router.post("/api/show")
    async def ollama_show(body: ShowRequest, _: Request) -> Response:
        """What Ollama's clients ask about a model."""
        _check(serving, body.model)
        tokenizer = serving.engine.tokenizer
        template = (tokenizer.chat_template if tokenizer is not None else None) or ""
        info = {"general.architecture": "jaxserve", "jaxserve.context_length": serving.max_model_len}
        reply = {"modelfile": "", "parameters": "", "template": template, "details": card["details"], "model_info": info}
        return Json(reply | {"capabilities": ["completion"], "modified_at": card["modified_at"]})

    @router.get("/api/version")
    async def ollama_version() -> Response:
        """The version, as Ollama's clients ask for it."""
        return Json({"version": __version__})

    return router


async def _answer(request: Request, batch: Batch, model: str, text_fields: TextFields, stream: bool) -> Response:
    reply = OllamaReply(batch, model, text_fields)
    if stream:
        return EventStream(reply.lines(), reply.abort, media_type="application/x-ndjson")
    try:
        return Json(await until_disconnect(request.scope, reply.whole()))
    finally:
        reply.abort()


def _check(serving: Serving, model: str, options: Options | None = None) -> None:
    serving.check_model(model if model == serving.model_name else model.removesuffix(":latest"))
    num_ctx = options.num_ctx if options is not None else None
    if num_ctx is not None and num_ctx > serving.max_model_len:
        text = f"num_ctx is {num_ctx:,}, and this server's prompts and outputs may have {serving.max_model_len:,} tokens"
        raise InvalidRequestError(text, param="options.num_ctx")


def _card(serving: Serving) -> dict[str, Any]:
    return {
        "name": serving.model_name,
        "model": serving.model_name,
        "modified_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "size": 0,
        "digest": hashlib.sha256(serving.model_name.encode()).hexdigest(),
        "details": {
            "parent_model": "", "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": "",
        },
    }  # fmt: skip
