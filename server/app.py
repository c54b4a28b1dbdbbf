"""create_app: the FastAPI app over an engine. Its lifespan starts and stops the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve import __version__
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import add_error_handlers
from jaxserve.server.keys import ApiKeys
from jaxserve.server.metrics import EngineMetrics
from jaxserve.server.middleware.access_log import AccessLog
from jaxserve.server.middleware.auth import Authentication
from jaxserve.server.middleware.body import BodyLimits
from jaxserve.server.middleware.hosts import AllowedHosts
from jaxserve.server.middleware.http_metrics import HttpMetrics
from jaxserve.server.middleware.rate_limit import RateLimit
from jaxserve.server.responses.store import ResponseStore
from jaxserve.server.route import JsonRoutes
from jaxserve.server.routes.chat import chat_router
from jaxserve.server.routes.completions import completions_router
from jaxserve.server.routes.health import health_router
from jaxserve.server.routes.messages import messages_router
from jaxserve.server.routes.models import models_router
from jaxserve.server.routes.ollama import ollama_router
from jaxserve.server.routes.page import page_router
from jaxserve.server.routes.profile import profile_router
from jaxserve.server.routes.responses import responses_router
from jaxserve.server.routes.tokens import tokens_router
from jaxserve.server.serving import Serving
from jaxserve.server.tracing import TraceContext

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine
    from jaxserve.server.tracing import Tracing


MAX_STORED_CHARACTERS = 2**26


def create_app(
    engine: AsyncEngine, config: ServerConfig, *, metrics: EngineMetrics | None = None, tracing: Tracing | None = None
) -> FastAPI:
    """The HTTP API over a loaded engine.

    Args:
        metrics: the observer that the engine was built with; without it /metrics stays at zero.
        tracing: the same, where there are traces.
    """
    serving = Serving(engine, config.prompt_timeout, tracing.remember if tracing is not None else lambda _: None)
    metrics = metrics or EngineMetrics(serving.model_name)
    metrics.set_cache_config(engine.config)
    responses = ResponseStore(config.max_stored_responses, MAX_STORED_CHARACTERS)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            responses.close()
            serving.close()
            await asyncio.to_thread(engine.shutdown)

    app = App(
        title="jaxserve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # both of these pages load their scripts from elsewhere
        redoc_url=None,
    )
    add_error_handlers(app)
    routers = [
        chat_router(serving),
        completions_router(serving),
        responses_router(serving, responses),
        messages_router(serving),
        ollama_router(serving),
        tokens_router(serving),
        models_router(serving),
        health_router(serving, metrics, config.metrics_alias),
        *([] if config.profile is None else [profile_router(Path(config.profile))]),
        page_router(),
    ]
    for router in routers:
        app.router.routes.extend(router.routes)  # not include_router: see JsonRoute
    app.entry = _in_layers(app.entry, app.routes, config, metrics)
    if tracing is not None:
        app.entry = TraceContext(app.entry)
    return app


class App(FastAPI):
    """FastAPI's routes and documents behind the server's own layers.

    Attributes:
        entry: what a request meets first.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.entry: ASGIApp = super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.entry(scope, receive, send)


def _in_layers(app: ASGIApp, routes: Iterable[BaseRoute], config: ServerConfig, metrics: EngineMetrics) -> ASGIApp:
    """The app with what a request passes on its way to a route; the last one comes first."""
    keys = ApiKeys.from_config(config)
    app = JsonRoutes(app, routes)
    app = BodyLimits(app, max_bytes=config.max_body_bytes, max_json_depth=config.max_json_depth)
    if config.rate_limit:
        app = RateLimit(app, per_minute=config.rate_limit)
    if keys:
        app = Authentication(app, keys=keys, isolate_prefix_cache=config.isolate_prefix_cache)
    if (hosts := config.hosts(has_keys=bool(keys))) is not None:
        app = AllowedHosts(app, hosts=hosts)
    if config.origins:
        app = CORSMiddleware(app, allow_origins=config.origins, allow_methods=["*"], allow_headers=["*"])
    return AccessLog(HttpMetrics(app, metrics=metrics))
