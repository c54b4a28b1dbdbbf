"""GET /health, /version and /metrics: what operators and probes ask."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.errors import EngineDeadError
from jaxserve.server.metrics import EngineMetrics
from jaxserve.server.serving import Serving
from jaxserve.server.wire import Json


def health_router(serving: Serving, metrics: EngineMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        if not serving.engine.is_healthy:
            raise EngineDeadError("the engine has stopped; restart the server")
        return Json({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        return Json({"version": __version__})

    @router.get("/metrics")
    async def prometheus_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
