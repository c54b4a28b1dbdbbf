"""What making a prompt may take: templates are stopped, and long texts hold up only each other."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.server.prompt_threads import LONG, PromptThreads, limited
from jaxserve.tokenizer import load_tokenizer
from tests.server.conftest import Serve
from tests.server.fake_engine import FakeEngine
from tests.tokenizer_files import write_byte_level

SLOW = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def test_a_loop_is_stopped() -> None:
    def work() -> None:
        while True:
            pass

    with pytest.raises(InvalidRequestError, match=r"within 0\.1 seconds"):
        limited(0.1, work)


def test_what_ends_in_time_is_left_alone() -> None:
    """Also where the time is up as it ends: the thread must be well afterwards."""
    ends = []
    for _ in range(30):
        begin_s = time.perf_counter()
        try:
            limited(0.005, lambda end=begin_s + 0.005: [None for _ in iter(lambda: time.perf_counter() < end, False)])  # type: ignore[misc]
            ends.append("in time")
        except InvalidRequestError:
            ends.append("too late")
    time.sleep(0.02)
    assert len(ends) == 30


def test_a_slow_template_is_stopped(serve: Serve, tmp_path: Path) -> None:
    template = "{% if messages | length > 100 %}" + SLOW + "{% endif %}{{ messages[0].content }}"
    engine = FakeEngine()
    tokenizer: Any = load_tokenizer(write_byte_level(tmp_path / "t.gguf", "gpt-2", chat_template=template))
    engine.tokenizer = tokenizer
    url = serve(engine, prompt_timeout=1)
    message = {"role": "user", "content": "a"}
    with httpx.Client(base_url=url, timeout=20) as client:
        slow = client.post("/v1/chat/completions", json={"messages": [message] * 200})
        assert slow.status_code == 400 and "within 1 seconds" in slow.json()["error"]["message"]
        assert client.post("/tokenize", json={"messages": [message]}).json()["count"] == 1
        assert client.post("/tokenize", json={"messages": [message] * 90}).status_code == 200  # on the same thread


def test_long_prompts_do_not_hold_up_others() -> None:
    async def run() -> None:
        threads = PromptThreads(20)
        go_on = threading.Event()
        long = asyncio.create_task(threads.run(LONG + 1, lambda: go_on.wait(20)))
        assert await threads.run(10, lambda: "done") == "done"
        assert not long.done()
        go_on.set()
        assert await long
        threads.close()

    asyncio.run(run())
