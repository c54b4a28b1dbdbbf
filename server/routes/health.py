"""GET /health, /ping, /load, /version and /metrics: what operators and probes ask."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.errors import EngineDeadError
from jaxserve.server.metrics import EngineMetrics
from jaxserve.server.serving import Serving
from jaxserve.server.wire import Json


def health_router(serving: Serving, metrics: EngineMetrics, alias: str | None) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine works, 503 when it has stopped."""
        if not serving.engine.is_healthy:
            raise EngineDeadError("the engine has stopped; restart the server")
        return Json({"status": "ok"})

    @router.get("/ping")
    async def ping() -> Response:
        """The same as /health."""
        return await health()

    @router.post("/ping")  # Amazon SageMaker asks so
    async def post_ping() -> Response:
        """The same as /health."""
        return await health()

    @router.get("/load")
    async def load() -> Response:
        """How many requests run and wait, and how full the KV pool is."""
        return Json(metrics.load())

    @router.get("/version")
    async def version() -> Response:
        """The version."""
        return Json({"version": __version__})

    @router.get("/metrics")
    async def prometheus_metrics() -> Response:
        """The metrics, in Prometheus's text format."""
        return Response(metrics.text(alias), media_type=CONTENT_TYPE_LATEST)

    return router
