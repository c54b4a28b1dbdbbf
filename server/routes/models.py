"""GET /v1/models, and one model of it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from jaxserve.server.serving import Serving
from jaxserve.server.wire import Json


def models_router(serving: Serving) -> APIRouter:
    router = APIRouter()
    card: dict[str, Any] = {
        "id": serving.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "jaxserve",
        "max_model_len": serving.max_model_len,
    }

    @router.get("/v1/models")
    async def list_models() -> Response:
        """The model that is served."""
        return Json({"object": "list", "data": [card]})

    @router.get("/v1/models/{name:path}")  # a model's name may have slashes
    async def retrieve_model(name: str) -> Response:
        """The same, by name."""
        serving.check_model(name)
        return Json(card)

    return router
