"""The short ways of a request and its answer: routes with a JSON body, one write for what comes together, the client's leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from jaxserve.async_engine import RequestStream
from jaxserve.errors import RequestError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.app import create_app
from jaxserve.server.batch import Batch
from jaxserve.server.config import ServerConfig
from jaxserve.server.connection import HeadAndBody
from jaxserve.server.route import JsonRoute
from jaxserve.server.streaming import PRESENCE, Presence, until_disconnect
from tests.server.fake_engine import FakeEngine


def test_every_route_with_a_body_is_called_directly() -> None:
    routes = [route for route in create_app(FakeEngine(), ServerConfig()).routes if isinstance(route, APIRoute)]
    with_body = [route for route in routes if route.body_field is not None]
    assert len(with_body) >= 10 and all(isinstance(route, JsonRoute) and route.takes_body for route in with_body)


@pytest.mark.parametrize("path", ["/api/chat", "/api/chat%0A"])
def test_a_page_elsewhere_cannot_post_without_a_type(http: httpx.Client, engine: FakeEngine, path: str) -> None:
    """Ollama's clients may, and send no Origin."""
    response = http.post(path, content=b'{"model": "m", "messages": []}', headers={"Origin": "https://evil.example"})
    assert response.status_code == 400 and "Content-Type" in response.json()["error"]
    assert not engine.submitted


class Engine:
    """Gives streams that already hold everything."""

    def __init__(self, *outputs: RequestOutput) -> None:
        self.outputs = outputs

    def submit(self, prompt: list[int], params: SamplingParams, *, request_id: str) -> RequestStream:
        stream = RequestStream(request_id, asyncio.get_running_loop(), lambda _: None)
        for output in self.outputs:
            stream.put(output)
        return stream


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_outputs_that_wait_come_together_and_before_an_error(num_prompts: int) -> None:
    some = RequestOutput("r", None, [1])
    error = RequestOutput("r", None, [1], finished=True, error="lost")

    async def run() -> None:
        batch = Batch(Engine(some, some, error), [([1], SamplingParams())] * num_prompts, "r")  # type: ignore[arg-type]
        seen = []
        with pytest.raises(RequestError, match="lost"):
            async for news in batch.outputs():
                seen.append(news)
        assert seen == [[(i, some) for i in range(num_prompts) for _ in range(2)]]

    asyncio.run(run())


class Transport:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        self.written.append(b"closed")


@pytest.mark.parametrize(
    ("do", "written"),
    [
        (lambda to: (to.write(b"head"), to.write(b"body"), to.write(b"more")), [b"headbody", b"more"]),
        (lambda to: to.write(b"head"), [b"head"]),
        (lambda to: (to.write(b"head"), to.close()), [b"head", b"closed"]),
    ],
)
def test_head_and_body_leave_together(do: Callable[[HeadAndBody], Any], written: list[bytes]) -> None:
    transport = Transport()

    async def run() -> None:
        do(HeadAndBody(transport, asyncio.get_running_loop()))  # type: ignore[arg-type]
        await asyncio.sleep(0)

    asyncio.run(run())
    assert transport.written == written


def test_until_disconnect() -> None:
    async def run() -> None:
        presence = Presence()
        scope: dict[str, Any] = {"extensions": {PRESENCE: presence}}
        assert await until_disconnect(scope, asyncio.sleep(0, "done")) == "done"
        other = asyncio.create_task(until_disconnect(scope, asyncio.sleep(60)))
        await asyncio.sleep(0)
        other.cancel()  # by the server's end, say
        with pytest.raises(asyncio.CancelledError):
            await other
        asyncio.get_running_loop().call_soon(presence.leave)
        with pytest.raises(ClientDisconnect):
            await until_disconnect(scope, asyncio.sleep(60))
        with pytest.raises(ClientDisconnect):
            await until_disconnect(scope, asyncio.sleep(60))  # it has gone before
        await asyncio.sleep(0)  # this task is not cancelled any more

    asyncio.run(run())
