"""`make soak`: many short requests over the real engine and socket, with aborts and broken connections; nothing may be left behind.

    python -m tests.soak [--requests 20000] [--concurrency 32] [--seed 0]

The model is tests/tiny.py's. Compared before and after: pages, streams, tasks, threads, file handles, and memory in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.progress import Progress

from tests.server.tiny_server import TinyServer, tiny_server

MAX_GROWTH_MIB = 12  # of memory in the second half; 10,000 requests that each left 2 KB would be 20

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/tokenize", "/nothing")


def body(path: str, rng: random.Random) -> dict[str, Any]:
    text = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 60)))
    chat: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    tokens, stream = rng.randint(1, 12), rng.random() < 0.6
    fields: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": text, "max_tokens": tokens, "stream": stream, "n": rng.choice([1, 1, 1, 3])},
        "/v1/chat/completions": chat | {"max_tokens": tokens, "stream": stream},
        "/v1/responses": {"input": text, "max_output_tokens": tokens, "stream": stream},
        "/v1/messages": chat | {"max_tokens": tokens, "stream": stream},
        "/api/chat": chat | {"options": {"num_predict": tokens}, "stream": stream},
        "/tokenize": {"prompt": text},
        "/nothing": {},
    }
    found = fields[path]
    if rng.random() < 0.03:
        found["temperature"] = "hot"  # refused
    return found


async def one(port: int, rng: random.Random) -> str:
    """One request on a connection of its own. Some clients go at once, some in the middle, some never send their body."""
    path = rng.choice(PATHS)
    content = json.dumps(body(path, rng)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    message = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fate = rng.random()
    try:
        if fate < 0.05:
            writer.write(message[: rng.randrange(len(message))])
            await writer.drain()
            return "half sent"
        writer.write(message)
        await writer.drain()
        if fate < 0.12:
            return "left at once"
        if fate < 0.25:
            await reader.read(rng.randint(1, 400))
            return "left in the middle"
        data = await reader.read(-1)
        status = int(data.split(b" ", 2)[1])
        assert status < 500, (path, content, data[:500])
        return f"answered {status // 100}xx"
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


async def storm(port: int, count: int, concurrency: int, rng: random.Random, advance: Any) -> dict[str, int]:
    fates: dict[str, int] = {}
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            async with asyncio.timeout(60):
                fate = await one(port, rng)
            fates[fate] = fates.get(fate, 0) + 1
            advance()

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return fates


def footprint(server: TinyServer) -> dict[str, float]:
    """What is held when nothing is going on."""
    server.assert_well()
    time.sleep(0.5)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but not given back, does not count
    status = Path("/proc/self/status").read_text(encoding="ascii")
    memory = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    engine = server.engine
    return {
        "memory MiB": int(memory.split()[1]) / 1024,
        "file handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": sum(isinstance(thing, asyncio.Task) and not thing.done() for thing in gc.get_objects()),
        "streams": len(engine._streams) + len(engine._admission._samples) + len(engine._admission._waiting_tokens),
        "pages held": engine.engine.scheduler.pool.num_held,
        "groups": len(engine.engine._groups) + len(engine.engine._completions),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tiny_server(max_stored_responses=50, access_log=False) as server, Progress() as progress:
        port = int(server.url.rsplit(":", 1)[1])
        task = progress.add_task("requests", total=args.requests)

        def run(count: int) -> dict[str, int]:
            return asyncio.run(storm(port, count, args.concurrency, rng, lambda: progress.advance(task)))

        run(args.requests // 4)
        before = footprint(server)
        run(args.requests // 4)
        halfway = footprint(server)
        fates = run(args.requests // 2)
        after = footprint(server)
    print(json.dumps({"fates": fates, "before": before, "halfway": halfway, "after": after}, indent=1))
    growth = after["memory MiB"] - halfway["memory MiB"]
    left = {name: (before[name], after[name]) for name in before if name != "memory MiB" and after[name] > before[name]}
    if left or growth > MAX_GROWTH_MIB:
        print(f"left behind: {left}, {growth:.1f} MiB", file=sys.stderr)
        return 1
    print(f"nothing is left behind; memory grew by {growth:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
