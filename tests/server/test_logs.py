"""The log: one record a request, and no client can write a line of its own."""

from __future__ import annotations

import json
import logging
import sys

import httpx
import pytest

from jaxserve.server.logs import ACCESS, JsonFormatter, TextFormatter
from tests.server.conftest import wait_for

NASTY = "a\r\n2026-01-01 INFO forged \x1b[2J\u2028\x00 %s {x}"


def record(message: str, *args: object, exc_info: bool = False) -> logging.LogRecord:
    return logging.LogRecord("jaxserve.x", logging.INFO, "", 0, message, args, sys.exc_info() if exc_info else None)


def test_a_message_is_one_line() -> None:
    text = TextFormatter().format(record("got %s", NASTY))
    assert len(text.splitlines()) == 1 and "\x1b" not in text and "forged" in text
    entry = JsonFormatter().format(record("got %s", NASTY))
    assert len(entry.splitlines()) == 1 and json.loads(entry)["message"] == f"got {NASTY}"


def test_tracebacks() -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        text, entry = (f().format(record("failed", exc_info=True)) for f in (TextFormatter, JsonFormatter))
    assert text.splitlines()[1].startswith("Traceback") and "KeyError: 'lost'" in json.loads(entry)["exception"]


def test_access_log(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, ACCESS):
        http.get("/v1/models/a%0d%0aforged%1b", headers={"X-Request-Id": "mine-1"})
        wait_for(lambda: bool(caplog.records))
    (one,) = caplog.records
    assert len(TextFormatter().format(one).splitlines()) == 1
    entry = json.loads(JsonFormatter().format(one))
    assert (entry["method"], entry["status"], entry["request_id"], entry["client"]) == ("GET", 404, "mine-1", "127.0.0.1")
    assert entry["path"] == "/v1/models/a\r\nforged\x1b" and entry["seconds"] >= 0


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a;b", "../x", "é"])
def test_request_ids(http: httpx.Client, given: str) -> None:
    assert http.get("/health", headers={"X-Request-Id": "ok_1.2-3"}).headers["X-Request-Id"] == "ok_1.2-3"
    own = http.get("/health", headers=[("X-Request-Id", given.encode())]).headers["X-Request-Id"]
    assert own != given and len(own) == 32
    assert http.get("/nothing").headers["X-Request-Id"] != own
