"""Tracing: the spans of a request follow each other and add up to its time."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import ConfigError
from jaxserve.server.metrics import EngineMetrics
from jaxserve.server.tracing import Tracing, make_provider, trace_to
from tests.server.conftest import Serve
from tests.server.fake_engine import FakeEngine
from tests.server.tiny_server import tiny_server
from tests.tiny import greedy, tiny_engine

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def children(spans: list[ReadableSpan], root: ReadableSpan) -> list[ReadableSpan]:
    own = [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]
    return sorted(own, key=lambda span: (span.start_time, span.end_time))


@pytest.mark.slow
def test_spans_add_up_to_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(EngineMetrics("tiny"), make_provider(exporter, "tiny"))
    engine = tiny_engine(observer=tracing)
    monkeypatch.setattr(engine.runner, "shutdown", lambda: None)

    async def run() -> None:
        served = AsyncEngine(engine)
        served.start()
        try:
            streams = [
                served.submit([1 + i % 90 for i in range(length)], greedy(tokens))
                for length, tokens in ((150, 5), (10, 20), (5, 1))
            ]
            for stream in streams:
                async for _ in stream:
                    pass
            served.submit([1, 2], greedy(200)).abort()
        finally:
            await asyncio.to_thread(served.shutdown)

    asyncio.run(run())
    tracing.close()
    spans = list(exporter.get_finished_spans())
    roots = sorted((span for span in spans if span.parent is None), key=lambda s: -s.attributes["gen_ai.usage.prompt_tokens"])
    assert len(roots) >= 3 and {root.name for root in roots} == {"llm_request"}
    for root in roots[:3]:
        parts = children(spans, root)
        assert parts[0].start_time == root.start_time and parts[-1].end_time == root.end_time
        for before, after in itertools.pairwise(parts):
            assert before.end_time == after.start_time
        names = [part.name for part in parts]
        assert names[0] == "queue" and names[-2:] == ["decode", "detokenize"] and set(names[1:-2]) == {"prefill"}
    assert [part.name for part in children(spans, roots[0])].count("prefill") >= 3  # 150 tokens in chunks of at most 64
    assert roots[0].attributes["gen_ai.usage.completion_tokens"] == 5


@pytest.mark.parametrize(
    ("headers", "is_child"),
    [
        ([("traceparent", PARENT), ("tracestate", "a=1")], True),
        ([("Traceparent", PARENT)], True),
        ([], False),
        ([("traceparent", "00-junk")], False),
        ([("traceparent", PARENT), ("traceparent", PARENT)], False),
    ],
)
def test_a_clients_trace_goes_on(headers: list[tuple[str, str]], is_child: bool) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(EngineMetrics("tiny"), make_provider(exporter, "tiny"))
    with tiny_server(tracing) as server:  # it has asked once before
        body = {"prompt": ["abc", "de"], "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200
        server.assert_well()
    assert not tracing._parents
    tracing.close()
    roots = [span for span in exporter.get_finished_spans() if span.name == "llm_request"]
    of_client = [span for span in roots if span.parent is not None]
    assert len(of_client) == (2 if is_child else 0) and len(roots) >= 3
    for root in of_client:
        assert (root.context.trace_id, root.parent and root.parent.span_id) == (TRACE_ID, 0xB7AD6B7169203331)
        assert all(part.context.trace_id == TRACE_ID for part in children(list(exporter.get_finished_spans()), root))


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxserve\[otel\]'"):
        trace_to("http://127.0.0.1:1", EngineMetrics("m"), "m")


def test_profile(serve: Serve, tmp_path: Path) -> None:
    url = serve(FakeEngine(), profile=str(tmp_path))
    assert httpx.post(f"{url}/stop_profile").status_code == 400
    assert httpx.post(f"{url}/start_profile", timeout=60).status_code == 200
    assert httpx.post(f"{url}/start_profile").status_code == 400
    assert httpx.post(f"{url}/stop_profile", timeout=60).status_code == 200
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert httpx.post(f"{serve(FakeEngine())}/start_profile").status_code == 404


def test_dashboard_asks_for_metrics_that_exist() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "grafana.json").read_text(encoding="utf-8")
    assert len(json.loads(text)["panels"]) >= 8
    reference = (root / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"(?:jaxserve:|http_)\w+", text)):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert f"`{base}`" in reference, name
