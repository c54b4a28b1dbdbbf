"""A running server under load: requests that arrive at random, whether or not the earlier ones are done.

Sends completions of random token ids to /v1/completions, at one rate after another, and reports the time to the first token
(TTFT), between tokens (ITL), per token after the first (TPOT) and to the end, and the goodput: requests a second that kept
within the limits given. Works with any server that speaks OpenAI's API and takes token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError

PERCENTILES = (50, 90, 99)
_FIRST_ID, _NUM_IDS = 100, 800  # ids that every vocabulary has, and that are no control tokens


@dataclass
class Sample:
    """One request as its client saw it; times in seconds.

    Attributes:
        ttft_s: None where no token came.
        itl_s: between one event with text and the next.
    """

    num_prompt_tokens: int
    num_output_tokens: int = 0
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        if self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", help="the model's name; the first that the server lists if not given")
    parser.add_argument("--api-key", help="the key to send")
    parser.add_argument("--request-rate", default="1", help="requests a second, or several with commas; inf sends all at once")
    parser.add_argument("--num-prompts", type=int, default=100, help="requests at each rate (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens (default: %(default)s)")
    parser.add_argument(
        "--range-ratio", type=float, default=0.0, help="lengths vary by this share, both ways (default: %(default)s)"
    )
    parser.add_argument("--prefix-len", type=int, default=0, help="prompt tokens that all requests share (default: %(default)s)")
    parser.add_argument("--slo-ttft-ms", type=float, default=math.inf, help="goodput counts requests with at most this TTFT")
    parser.add_argument("--slo-tpot-ms", type=float, default=math.inf, help="and at most this TPOT")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--svg", metavar="FILE", help="draw them over the rates")


def run(args: argparse.Namespace) -> None:
    rates = _rates(args.request_rate)
    if min(args.num_prompts, args.input_len, args.output_len) < 1 or not 0 <= args.range_ratio < 1:
        raise ConfigError("num-prompts and the lengths must be at least 1, range-ratio from 0 to below 1")
    results = asyncio.run(_sweep(args, rates))
    _print(results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.svg:
        Path(args.svg).write_text(_draw(results), encoding="utf-8")
    if not any(result["completed"] for result in results):
        raise ConfigError(f"no request was completed; the last error: {results[-1]['last_error']}")


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 for rate in rates):
        raise ConfigError(f"request-rate must be numbers above 0, with commas, or inf; got {text!r}")
    return rates


async def _sweep(args: argparse.Namespace, rates: Sequence[float]) -> list[dict[str, Any]]:
    import httpx
    from rich.console import Console
    from rich.progress import Progress

    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    results = []
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=None, limits=limits) as client:
        model = args.model or await _first_model(client, args.url)
        with Progress(console=Console(stderr=True)) as progress:
            for rate in rates:
                task = progress.add_task(f"{rate:g} requests/s", total=args.num_prompts)
                rng = random.Random(args.seed)
                bodies = [_body(args, model, rng) for _ in range(args.num_prompts)]
                started_s = time.perf_counter()
                samples = await _send_all(client, bodies, rate, rng, partial(progress.advance, task))
                seconds = time.perf_counter() - started_s
                results.append(summary(samples, rate, seconds, args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3))
    return results


async def _first_model(client: Any, url: str) -> str:
    import httpx

    try:
        response = await client.get("/v1/models")
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as e:
        raise ConfigError(f"{url} does not list a model: {e}. Start the server, or give --url or --api-key.") from e


def _body(args: argparse.Namespace, model: str, rng: random.Random) -> dict[str, Any]:
    def around(length: int) -> int:
        return max(1, round(length * rng.uniform(1 - args.range_ratio, 1 + args.range_ratio)))

    shared = random.Random(args.seed + 1)
    prompt = [_FIRST_ID + shared.randrange(_NUM_IDS) for _ in range(args.prefix_len)]
    prompt += [_FIRST_ID + rng.randrange(_NUM_IDS) for _ in range(around(args.input_len))]
    options = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "prompt": prompt, "max_tokens": around(args.output_len), **options}


async def _send_all(
    client: Any, bodies: Sequence[dict[str, Any]], rate: float, rng: random.Random, on_done: Callable[[], object]
) -> list[Sample]:
    """Sends each when its time has come: the times between arrivals are exponential, so that arrivals are a Poisson process."""

    async def send(body: dict[str, Any], after_s: float) -> Sample:
        await asyncio.sleep(after_s)
        sample = await _send(client, body)
        on_done()
        return sample

    at_s, tasks = 0.0, []
    async with asyncio.TaskGroup() as group:
        for body in bodies:
            tasks.append(group.create_task(send(body, at_s)))
            at_s += rng.expovariate(rate) if rate < math.inf else 0.0
    return [task.result() for task in tasks]


async def _send(client: Any, body: dict[str, Any]) -> Sample:
    import httpx

    sample = Sample(len(body["prompt"]))
    started_s = last_s = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                sample.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
                return sample
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now_s, event = time.perf_counter(), json.loads(line[6:])
                if "error" in event:
                    sample.error = str(event["error"])
                    return sample
                if event.get("usage"):
                    sample.num_output_tokens = event["usage"]["completion_tokens"]
                if event["choices"]:
                    if sample.ttft_s is None:
                        sample.ttft_s = now_s - started_s
                    else:
                        sample.itl_s.append(now_s - last_s)
                    last_s = now_s
    except httpx.HTTPError as e:
        sample.error = f"{type(e).__name__}: {e}"
    sample.e2e_s = last_s - started_s
    return sample


def summary(samples: Sequence[Sample], rate: float, seconds: float, slo_ttft_s: float, slo_tpot_s: float) -> dict[str, Any]:
    """The figures of one rate; times in milliseconds."""
    done = [sample for sample in samples if sample.error is None and sample.ttft_s is not None]
    good = [s for s in done if (s.ttft_s or 0) <= slo_ttft_s and (s.tpot_s or 0) <= slo_tpot_s]
    times = {
        "ttft_ms": [s.ttft_s for s in done if s.ttft_s is not None],
        "tpot_ms": [s.tpot_s for s in done if s.tpot_s is not None],
        "itl_ms": [itl for s in done for itl in s.itl_s],
        "e2e_ms": [s.e2e_s for s in done],
    }
    errors = [sample.error for sample in samples if sample.error is not None]
    return {
        "request_rate": rate if rate < math.inf else "inf",
        "completed": len(done),
        "failed": len(samples) - len(done),
        "last_error": errors[-1] if errors else None,
        "seconds": seconds,
        "requests_per_s": len(done) / seconds,
        "goodput_per_s": len(good) / seconds,
        "prompt_tokens_per_s": sum(s.num_prompt_tokens for s in done) / seconds,
        "output_tokens_per_s": sum(s.num_output_tokens for s in done) / seconds,
        **{name: {f"p{p}": percentile(values, p) * 1e3 for p in PERCENTILES} for name, values in times.items()},
    }


def percentile(values: Sequence[float], p: float) -> float:
    """The smallest value that at least p per cent do not exceed; 0 where there are none."""
    return sorted(values)[max(0, math.ceil(len(values) * p / 100) - 1)] if values else 0.0


def _print(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", show_edge=False)
    for result in results:
        table.add_column(f"{result['request_rate']} /s", justify="right")
    for name in ("completed", "failed", "requests_per_s", "goodput_per_s", "prompt_tokens_per_s", "output_tokens_per_s"):
        table.add_row(name, *[f"{result[name]:,.2f}".removesuffix(".00") for result in results])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        for p in PERCENTILES:
            table.add_row(f"{name} p{p}", *[f"{result[name][f'p{p}']:,.1f}" for result in results])
    Console().print(table)


def _draw(results: Sequence[dict[str, Any]]) -> str:
    from jaxserve.cli_chart import line_charts

    finite = [result for result in results if result["request_rate"] != "inf"]
    if not finite:
        raise ConfigError("--svg needs a request rate that is not inf")
    charts = {
        title: {f"p{p}": [result[name][f"p{p}"] for result in finite] for p in PERCENTILES}
        for title, name in {"TTFT (ms)": "ttft_ms", "TPOT (ms)": "tpot_ms", "ITL (ms)": "itl_ms"}.items()
    }
    served = {name: [result[f"{name}_per_s"] for result in finite] for name in ("requests", "goodput")}
    return line_charts({**charts, "requests/s": served}, "requests/s sent", [result["request_rate"] for result in finite])
