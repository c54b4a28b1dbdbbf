"""A fake engine behind a real socket: uvicorn in a thread, on a free port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import openai
import pytest

from jaxserve.async_engine import AsyncEngine
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.run import Server, bind
from jaxserve.server.tracing import Tracing
from tests.server.fake_engine import FakeEngine

Serve = Callable[..., str]


@contextmanager
def served(engine: FakeEngine | AsyncEngine, config: ServerConfig, tracing: Tracing | None = None) -> Iterator[str]:
    """The URL of a server over `engine`, that stops at the end."""
    ready = threading.Event()
    with bind(config) as sock:
        server = Server(create_app(engine, config, tracing=tracing), sock, config, lambda _: ready.set())
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        try:
            assert ready.wait(20)
            yield server.url
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits for what must come; fails after ten seconds."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server over an engine and gives its URL."""
    with ExitStack() as stack:
        yield lambda engine, **options: stack.enter_context(
            served(engine, ServerConfig(port=0, **({"shutdown_timeout": 1} | options)))
        )


@pytest.fixture(scope="session")
def shared_server() -> Iterator[tuple[FakeEngine, str]]:
    """One server for the tests that need no options of their own."""
    engine = FakeEngine()
    with served(engine, ServerConfig(port=0, shutdown_timeout=1)) as url:
        yield engine, url


@pytest.fixture
def engine(shared_server: tuple[FakeEngine, str]) -> FakeEngine:
    """The shared server's engine, as new."""
    engine, _ = shared_server
    wait_for(lambda: not engine.running)  # whatever the last test has left must end
    engine.reset()
    return engine


@pytest.fixture
def url(shared_server: tuple[FakeEngine, str], engine: FakeEngine) -> str:
    return shared_server[1]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client
