"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.server.anthropic.protocol import CountRequest, MessagesRequest
from jaxserve.server.anthropic.reply import MessageReply
from jaxserve.server.reply import new_request_id
from jaxserve.server.route import JsonRoute
from jaxserve.server.serving import Serving, salt_of
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json


def messages_router(serving: Serving) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/messages")
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Anthropic's messages, whole or streamed."""
        serving.check_model(body.model)
        batch = await serving.start_chat(body.as_chat(), new_request_id("msg"), salt_of(request))
        reply = MessageReply(batch, serving.model_name)
        if body.stream:
            return EventStream(reply.events(), reply.abort)
        try:
            return Json(await until_disconnect(request.scope, reply.whole()))
        finally:
            reply.abort()

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest, _: Request) -> Response:
        """How many tokens a request of /v1/messages would have."""
        serving.check_model(body.model)
        return Json({"input_tokens": len(await serving.chat_prompt(body.as_chat()))})

    return router
