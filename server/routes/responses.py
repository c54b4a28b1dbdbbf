"""POST /v1/responses; GET and DELETE /v1/responses/{id}, and POST /v1/responses/{id}/cancel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.errors import InvalidRequestError, JaxserveError
from jaxserve.server.errors import NotFoundError
from jaxserve.server.reply import new_request_id
from jaxserve.server.responses.protocol import ResponsesRequest
from jaxserve.server.responses.reply import ResponsesReply
from jaxserve.server.responses.store import ResponseStore, StoredResponse
from jaxserve.server.route import JsonRoute
from jaxserve.server.serving import Serving, owner_of, salt_of
from jaxserve.server.streaming import EventStream, until_disconnect
from jaxserve.server.wire import Json

log = logging.getLogger(__name__)


def responses_router(serving: Serving, store: ResponseStore) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/responses")
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """OpenAI's responses: whole, streamed or in the background."""
        if body.background and (body.stream or not body.store):
            raise InvalidRequestError("background needs store, and goes without stream", param="background")
        serving.check_model(body.model)
        owner = owner_of(request)
        before = find(body.previous_response_id, owner).messages if body.previous_response_id else []
        chat = body.as_chat(before)
        batch = await serving.start_chat(chat, new_request_id("resp"), salt_of(request))
        params = serving.sampling_params(chat, len(batch.prompts[0]))
        reply = ResponsesReply(serving, batch, params, body)
        stored = StoredResponse(owner, reply.body, [*before, *body.messages()])
        if body.background:
            store.put(stored)
            stored.task = asyncio.create_task(_make(reply, stored))
            return Json(reply.body)
        if body.stream:
            return EventStream(_events(reply, stored, store if body.store else None), reply.abort)
        try:
            await until_disconnect(request.scope, reply.whole())
        finally:
            reply.abort()
        if body.store:
            _keep(reply, stored, store)
        return Json(reply.body)

    @router.get("/v1/responses/{response_id}")
    async def retrieve_response(response_id: str, request: Request) -> Response:
        """A response that is kept."""
        return Json(find(response_id, owner_of(request)).body)

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> Response:
        """Forgets a response."""
        find(response_id, owner_of(request))
        store.delete(response_id, owner_of(request))
        return Json({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(response_id: str, request: Request) -> Response:
        """Stops a response that is made in the background."""
        stored = find(response_id, owner_of(request))
        if stored.task is None:
            raise InvalidRequestError("only a response that was made with background can be cancelled", param="response_id")
        if not stored.task.done():
            stored.task.cancel()
            await asyncio.gather(stored.task, return_exceptions=True)
        return Json(stored.body)

    def find(response_id: str, owner: str) -> StoredResponse:
        stored = store.get(response_id, owner)
        if stored is None:
            text = "no such response; it was not stored, or it is the oldest and was forgotten"
            raise NotFoundError(text, param="response_id")
        return stored

    return router


async def _make(reply: ResponsesReply, stored: StoredResponse) -> None:
    """Makes a response in the background."""
    try:
        await reply.whole()
        stored.messages.append(_answer(reply))
    except asyncio.CancelledError:
        stored.body["status"] = "cancelled"
        raise
    except Exception as e:
        if not isinstance(e, JaxserveError):
            log.exception("a response failed")
        reply.fail(e)
    finally:
        reply.abort()


async def _events(reply: ResponsesReply, stored: StoredResponse, store: ResponseStore | None) -> AsyncGenerator[bytes]:
    async with aclosing(reply.events()) as events:
        async for event in events:
            yield event
    if store is not None:
        _keep(reply, stored, store)


def _keep(reply: ResponsesReply, stored: StoredResponse, store: ResponseStore) -> None:
    stored.messages.append(_answer(reply))
    store.put(stored)


def _answer(reply: ResponsesReply) -> dict[str, str]:
    return {"role": "assistant", "content": reply.text}
