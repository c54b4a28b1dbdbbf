"""POST /tokenize and /detokenize, GET /tokenizer_info: vLLM's names and fields. lm-eval takes the server for its tokenizer so."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from jaxserve.errors import InvalidRequestError
from jaxserve.server.protocol import MAX_MESSAGES, ChatFields, Fields, Message, Text
from jaxserve.server.route import JsonRoute
from jaxserve.server.serving import Serving
from jaxserve.server.wire import Json

MAX_TOKENS = 2**22


class TokenizeRequest(ChatFields):
    """The body of POST /tokenize: a prompt, or messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Fields):
    """The body of POST /detokenize."""

    model: Text | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENS)


def tokens_router(serving: Serving) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, _: Request) -> Response:
        """Text or messages to token ids."""
        serving.check_model(body.model)
        if (body.prompt is None) == (not body.messages):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            (tokens,) = await serving.encode([body.prompt], body.add_special_tokens)
        else:
            tokens = await serving.chat_prompt(body)
        strings = [serving.tokenizer("prompt").token_text(i) for i in tokens] if body.return_token_strs else None
        reply: dict[str, Any] = {"count": len(tokens), "max_model_len": serving.max_model_len, "tokens": tokens}
        return Json(reply | {"token_strs": strings})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, _: Request) -> Response:
        """Token ids to text."""
        serving.check_model(body.model)
        vocab_size = serving.tokenizer("tokens").vocab_size
        for i, token_id in enumerate(body.tokens):
            if not 0 <= token_id < vocab_size:
                text = f"tokens[{i}] must be a token id below {vocab_size:,}; got {token_id}"
                raise InvalidRequestError(text, param="tokens")
        return Json({"prompt": await serving.decode(body.tokens)})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """The chat template and the special tokens."""
        tokenizer = serving.tokenizer("tokenizer")
        return Json({"tokenizer_class": "Tokenizer", "chat_template": tokenizer.chat_template, **tokenizer.special_tokens})

    return router
