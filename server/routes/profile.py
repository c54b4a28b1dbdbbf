"""POST /start_profile and /stop_profile: a trace of what the device does, for TensorBoard or Perfetto. Only with --profile."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from jaxserve.errors import InvalidRequestError
from jaxserve.server.wire import Json


def profile_router(folder: Path) -> APIRouter:
    router = APIRouter()
    lock = asyncio.Lock()
    running = False

    @router.post("/start_profile")
    async def start_profile() -> Response:
        """Begins a trace of the device."""
        nonlocal running
        async with lock:
            if running:
                raise InvalidRequestError("a profile is being taken already; /stop_profile ends it")
            import jax

            await asyncio.to_thread(jax.profiler.start_trace, folder)
            running = True
        return Json({"profile": "started"})

    @router.post("/stop_profile")
    async def stop_profile() -> Response:
        """Ends the trace and writes it."""
        nonlocal running
        async with lock:
            if not running:
                raise InvalidRequestError("no profile is being taken; /start_profile begins one")
            import jax

            running = False
            await asyncio.to_thread(jax.profiler.stop_trace)
        return Json({"profile": "written"})

    return router
