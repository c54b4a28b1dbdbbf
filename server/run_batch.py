"""`jaxserve run-batch`: answers a file of requests in OpenAI's batch format with a file of responses. Opens no address."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from jaxserve.errors import ConfigError, InvalidRequestError, JaxserveError
from jaxserve.server.errors import describe, explain_validation
from jaxserve.server.protocol import ChatRequest, CompletionRequest
from jaxserve.server.reply import Reply, new_request_id
from jaxserve.server.routes.chat import chat_reply
from jaxserve.server.routes.completions import completion_reply
from jaxserve.server.serving import Serving
from jaxserve.server.wire import encode_line

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine

log = logging.getLogger(__name__)

_OBJECTS = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}


class Counts:
    """What has become of the requests."""

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0


def run_batch(
    engine: AsyncEngine,
    input_path: Path,
    output_path: Path,
    *,
    concurrency: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Counts:
    """Answers each line of a file; the answers come in the order in which they are ready.

    Args:
        engine: loaded; it is started and shut down here.
        concurrency: requests in flight at most.
        on_progress: called with the requests done, and all of them.

    Raises:
        ConfigError: a file cannot be opened.
    """
    try:
        total = sum(1 for _ in _lines(input_path))
        output = output_path.open("xb")
    except (OSError, UnicodeDecodeError) as e:
        text = "it exists; choose another, or remove it" if isinstance(e, FileExistsError) else getattr(e, "strerror", None) or e
        raise ConfigError(f"cannot open {getattr(e, 'filename', None) or input_path}: {text}") from e
    counts = Counts()

    async def answer_all() -> None:
        serving = Serving(engine)
        slots = asyncio.Semaphore(concurrency)
        seen: set[str] = set()

        async def answer(line: str) -> None:
            try:
                entry = await _answer(serving, line, seen)
                output.write(encode_line(entry))
                is_ok = entry["response"] is not None and entry["response"]["status_code"] == 200
                counts.completed += is_ok
                counts.failed += not is_ok
                on_progress(counts.completed + counts.failed, total)
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                for line in _lines(input_path):
                    await slots.acquire()
                    tasks.create_task(answer(line))
        finally:
            serving.close()

    engine.start()
    try:
        with output:
            asyncio.run(answer_all())
    finally:
        engine.shutdown()
    return counts


def model_of(path: Path) -> str:
    """The model that the first request of a file names.

    Raises:
        ConfigError: it names none, or the file cannot be read.
    """
    try:
        name = json.loads(next(_lines(path), "{}"))["body"]["model"]
    except OSError as e:
        raise ConfigError(f"cannot open {path}: {e.strerror}") from e
    except (ValueError, RecursionError, LookupError, TypeError):
        name = None
    if not isinstance(name, str):
        raise ConfigError(f"no model: the first request of {path} names none. Give MODEL.")
    return name


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.strip())


async def _answer(serving: Serving, line: str, seen: set[str]) -> dict[str, Any]:
    """One line of the output."""
    custom_id: str | None = None
    try:
        request = json.loads(line)
        if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
            raise InvalidRequestError("a line must be a JSON object with a custom_id")
        custom_id = request["custom_id"]
        if custom_id in seen:
            raise InvalidRequestError(f"custom_id {custom_id!r} comes a second time")
        seen.add(custom_id)
        if request.get("method", "POST") != "POST" or request.get("url") not in _OBJECTS:
            raise InvalidRequestError(f"a request must be a POST to one of {', '.join(_OBJECTS)}")
    except (json.JSONDecodeError, RecursionError, JaxserveError) as e:
        error = {"code": "invalid_line", "message": str(e) if isinstance(e, JaxserveError) else "the line is not valid JSON"}
        return {"id": new_request_id("batch_req"), "custom_id": custom_id, "response": None, "error": error}
    status, body = await _respond(serving, request["url"], request.get("body"))
    response = {"status_code": status, "request_id": body.get("id", new_request_id("req")), "body": body}
    return {"id": new_request_id("batch_req"), "custom_id": custom_id, "response": response, "error": None}


async def _respond(serving: Serving, url: str, body: Any) -> tuple[int, dict[str, Any]]:
    """The status and the body that the server would have given."""
    reply: Reply | None = None
    try:
        if isinstance(body, dict) and body.get("stream"):
            raise InvalidRequestError("a request of a batch cannot be streamed", param="stream")
        if url == "/v1/chat/completions":
            reply = await chat_reply(serving, ChatRequest.model_validate(body))
        else:
            reply = await completion_reply(serving, CompletionRequest.model_validate(body))
        return 200, await reply.whole(_OBJECTS[url])
    except ValidationError as e:
        return describe(explain_validation(e))
    except Exception as e:
        if not isinstance(e, JaxserveError):
            log.exception("a request failed")
        return describe(e)
    finally:
        if reply is not None:
            reply.abort()
