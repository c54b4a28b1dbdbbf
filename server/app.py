"""create_app: the FastAPI app over an engine. Its lifespan starts and stops the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

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

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine


MAX_STORED_CHARACTERS = 2**26


def create_app(engine: AsyncEngine, config: ServerConfig, *, metrics: EngineMetrics | None = None) -> FastAPI:
    """The HTTP API over a loaded engine.

    Args:
        metrics: the observer that the engine was built with; without it /metrics stays at zero.
    """
    serving = Serving(engine)
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

    app = FastAPI(
        title="jaxserve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # both of these pages load their scripts from elsewhere
        redoc_url=None,
    )
    add_error_handlers(app)
    app.include_router(chat_router(serving))
    app.include_router(completions_router(serving))
    app.include_router(responses_router(serving, responses))
    app.include_router(messages_router(serving))
    app.include_router(ollama_router(serving))
    app.include_router(tokens_router(serving))
    app.include_router(models_router(serving))
    app.include_router(health_router(serving, metrics, config.metrics_alias))
    if config.profile is not None:
        app.include_router(profile_router(Path(config.profile)))
    app.include_router(page_router())
    _add_layers(app, config, metrics)
    return app


def _add_layers(app: FastAPI, config: ServerConfig, metrics: EngineMetrics) -> None:
    """What a request passes on its way to a route; the last one added comes first."""
    keys = ApiKeys.from_config(config)
    app.add_middleware(
        BodyLimits, max_bytes=config.max_body_bytes, max_json_depth=config.max_json_depth, timeout_s=config.body_timeout
    )
    if config.rate_limit:
        app.add_middleware(RateLimit, per_minute=config.rate_limit)
    if keys:
        app.add_middleware(Authentication, keys=keys, isolate_prefix_cache=config.isolate_prefix_cache)
    if (hosts := config.hosts(has_keys=bool(keys))) is not None:
        app.add_middleware(AllowedHosts, hosts=hosts)
    if config.origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(HttpMetrics, metrics=metrics)
    app.add_middleware(AccessLog)
