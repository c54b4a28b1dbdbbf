"""The real engine over a tiny random model, with a token for each printable ASCII character, behind a real socket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from jaxserve.async_engine import AsyncEngine
from jaxserve.server.config import ServerConfig
from jaxserve.server.tracing import Tracing
from tests.server.conftest import served, wait_for
from tests.tiny import VOCAB, tiny_engine

FIRST = 32  # the character of id 0


class AsciiTokenizer:
    """Ids are characters; what has none becomes `?`."""

    vocab_size = VOCAB
    special_ids = frozenset({VOCAB - 1})
    end_token_ids = (VOCAB - 1,)
    longest_token = 1
    strips_space = False
    special_tokens: dict[str, str] = {"eos_token": "<end>"}  # noqa: RUF012
    chat_template = "{{ messages }}"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) - FIRST if FIRST <= ord(char) < FIRST + VOCAB - 1 else ord("?") - FIRST for char in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.token_text(i) for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        return self.encode(" ".join(message["content"] for message in messages) + ">")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([FIRST + token_id]) if 0 <= token_id < VOCAB - 1 else b""


class TinyServer:
    """A server to be tried hard, and the answer that it must still give afterwards."""

    def __init__(self, url: str, engine: AsyncEngine) -> None:
        self.url = url
        self.engine = engine
        self.client = httpx.Client(base_url=url, timeout=30)
        self._answer = self._ask()

    def assert_well(self) -> None:
        """Nothing runs any more, no page is held, and a normal request gets its normal answer."""
        wait_for(lambda: not self.engine._streams and not self.engine.engine.has_work)
        assert self.engine.engine.scheduler.pool.num_held == 0
        assert self.client.get("/health").status_code == 200
        assert self._ask() == self._answer
        self.engine.engine.check_integrity()

    def _ask(self) -> str:
        body = {"prompt": "The quick brown fox", "max_tokens": 20, "temperature": 0}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200
        return str(response.json()["choices"][0]["text"])


@contextmanager
def tiny_server(tracing: Tracing | None = None, **options: Any) -> Iterator[TinyServer]:
    """A server over a tiny engine, whose answers are short if nothing else is asked for."""
    engine = tiny_engine(AsciiTokenizer(), tracing)
    engine.default_sampling["max_tokens"] = 4
    served_engine = AsyncEngine(engine)
    with served(served_engine, ServerConfig(port=0, shutdown_timeout=1, **options), tracing) as url:
        server = TinyServer(url, served_engine)
        try:
            yield server
        finally:
            server.client.close()
