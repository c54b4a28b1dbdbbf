"""The HTTP layer alone: the real server over an engine that costs nothing, beside a bare FastAPI app that streams constants.

    python bench/http_layer.py [--streams 256] [--tokens 200] [--seconds 3] [--json FILE]

Each server runs in a process of its own, under the same uvicorn; the client is this process, and the same for both. Reported are
requests/s of whole (not streamed) answers, events/s of concurrent streams, and the ratio of the two servers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from jaxserve.config import EngineConfig
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import OutputKind, SamplingParams

MODEL = "null"


class NullTokenizer:
    """A token is a word."""

    chat_template = "{{ messages }}"
    longest_token = 8
    vocab_size = 1000

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text.split())

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        return [0] * 10


class NullEngine:
    """Each step gives every request its next word at once, as AsyncEngine would get it from a real engine."""

    def __init__(self) -> None:
        self.config = EngineConfig.from_options(model=MODEL, max_model_len=4096)
        self.tokenizer = NullTokenizer()
        self.default_sampling: dict[str, Any] = {}
        self.description = {"model": MODEL}
        self.answered: list[str] = []
        self._requests: dict[str, tuple[RequestOutput, RequestOutput, int]] = {}  # what comes, what ends it, how many are to come

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def check(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0) -> None:
        pass

    def add_request(self, prompt_token_ids: list[int], params: SamplingParams, *, request_id: str, **options: Any) -> None:
        max_tokens = params.max_tokens or 1
        count = max_tokens if params.output_kind is OutputKind.FINAL_ONLY else 1
        some, last = (
            RequestOutput(
                request_id,
                None,
                prompt_token_ids,
                [CompletionOutput(0, " word" * count, [0] * count, finish_reason=reason)],
                reason is not None,
            )
            for reason in (None, "length")
        )
        self._requests[request_id] = (some, last, max_tokens // count)

    def abort(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        outputs = []
        for name, (some, last, left) in list(self._requests.items()):
            if left == 1:
                outputs.append(last)
                del self._requests[name]
            else:
                outputs.append(some)
                self._requests[name] = (some, last, left - 1)
        return outputs

    def fail_all(self, error: str) -> list[RequestOutput]:
        return []

    def shutdown(self) -> None:
        pass


def serve(kind: str) -> None:
    """A server in this process, until it is told to stop."""
    from jaxserve.async_engine import AsyncEngine
    from jaxserve.server.app import create_app
    from jaxserve.server.config import ServerConfig
    from jaxserve.server.run import Server, bind

    config = ServerConfig(port=0, shutdown_timeout=1)
    app = create_app(AsyncEngine(NullEngine()), config) if kind == "jaxserve" else bare_app()
    gc.collect()
    gc.freeze()  # as jaxserve.startup does
    with bind(config) as sock:
        Server(app, sock, config, lambda url: print(url, flush=True)).run(sockets=[sock])


class Body(BaseModel):
    """What the bare app takes."""

    messages: list[dict[str, str]]
    max_tokens: int
    stream: bool = False


def bare_app() -> Any:
    """What anybody would write first: the same events, from a constant."""
    app = FastAPI()
    choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
    head = {"id": "chatcmpl-" + "0" * 32, "created": 1_700_000_000, "model": MODEL, "object": "chat.completion.chunk"}
    event = b"data: " + json.dumps({**head, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"

    async def events(count: int) -> AsyncGenerator[bytes]:
        for _ in range(count):
            await asyncio.sleep(0)
            yield event
        yield b"data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def chat(body: Body) -> Response:
        if body.stream:
            return StreamingResponse(events(body.max_tokens), media_type="text/event-stream")
        return Response(event, media_type="application/json")

    return app


def request(port: int, max_tokens: int, stream: bool) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": max_tokens, "stream": stream}
    content = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


async def stream_once(port: int, max_tokens: int) -> int:
    """Reads a stream to its end, and returns its events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(port, max_tokens, stream=True))
    data = bytearray()
    while chunk := await reader.read(1 << 18):
        data += chunk
        if data.find(b"[DONE]", -64) >= 0:
            break
    writer.close()
    return data.count(b'"delta"')


async def whole_loop(port: int, until_s: float) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    while time.perf_counter() < until_s:
        writer.write(request(port, 1, stream=False))
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        await reader.readexactly(length)
        count += 1
    writer.close()
    return count


async def measure(port: int, args: argparse.Namespace) -> dict[str, float]:
    await asyncio.gather(*[stream_once(port, 10) for _ in range(16)])  # warm
    started_s = time.perf_counter()
    events = await asyncio.gather(*[stream_once(port, args.tokens) for _ in range(args.streams)])
    stream_s = time.perf_counter() - started_s
    if min(events) < args.tokens:
        raise SystemExit(f"a stream broke off after {min(events)} of {args.tokens} events")
    started_s = time.perf_counter()
    requests = await asyncio.gather(*[whole_loop(port, started_s + args.seconds) for _ in range(32)])
    return {"events_per_s": sum(events) / stream_s, "requests_per_s": sum(requests) / (time.perf_counter() - started_s)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3, help="the best of each counts")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", choices=["jaxserve", "bare"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    best: dict[str, dict[str, float]] = {}
    processes = {}
    for kind in ("jaxserve", "bare"):
        processes[kind] = subprocess.Popen([sys.executable, __file__, "--serve", kind], stdout=subprocess.PIPE, text=True)
    try:
        ports = {
            kind: int((process.stdout.readline() if process.stdout else "").rsplit(":", 1)[1])
            for kind, process in processes.items()
        }
        for _ in range(args.rounds):  # in turn, as the machine may be busy now and idle then
            for kind, port in ports.items():
                for name, value in asyncio.run(measure(port, args)).items():
                    best.setdefault(kind, {})[name] = max(value, best.get(kind, {}).get(name, 0.0))
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()
    ratio = {name: best["jaxserve"][name] / best["bare"][name] for name in best["bare"]}
    result = {"streams": args.streams, "tokens": args.tokens, **best, "ratio": ratio}
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
