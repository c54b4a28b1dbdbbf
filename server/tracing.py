"""Tracing: each request as an OpenTelemetry trace, whose parts follow each other from its arrival to its end."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.errors import ConfigError
from jaxserve.metrics import FinishedStats, Observer, StepStats, TokenStats

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue

MAX_PARENTS = 10_000

_parent: ContextVar[Context | None] = ContextVar("parent", default=None)

Part = tuple[str, float, float]
"""(name, beginning, end), by the engine's clock."""


class Tracing:
    """An Observer that makes traces, and tells another one everything.

    Spans are sent by a thread of the library's; the engine's thread only makes them.
    """

    def __init__(self, observer: Observer, provider: TracerProvider) -> None:
        self._observer = observer
        self._provider = provider
        self._tracer = provider.get_tracer("jaxserve")
        self._parents: OrderedDict[str, Context] = OrderedDict()  # of requests that have not ended, by their ids

    def on_step(self, stats: StepStats) -> None:
        self._observer.on_step(stats)

    def on_tokens(self, stats: TokenStats) -> None:
        self._observer.on_tokens(stats)

    def on_finished(self, stats: FinishedStats) -> None:
        self._observer.on_finished(stats)
        self._record(stats)

    def remember(self, request_id: str) -> None:
        """A request of the engine begins, in the context of its HTTP request: its trace goes on with the client's."""
        parent = _parent.get()
        if parent is not None:
            self._parents[request_id] = parent
            if len(self._parents) > MAX_PARENTS:  # some were refused, and have never ended
                self._parents.popitem(last=False)

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()

    def _record(self, stats: FinishedStats) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        offset_ns = time.time_ns() - int(stats.ended_s * 1e9)

        def at(seconds: float) -> int:
            return int(seconds * 1e9) + offset_ns

        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.id": stats.request_id,
            "gen_ai.request.n": stats.n,
            "gen_ai.usage.prompt_tokens": stats.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": stats.num_generation_tokens,
            "gen_ai.usage.cached_tokens": stats.num_cached_tokens,
            "gen_ai.response.finish_reasons": (stats.finish_reason,),
            "gen_ai.latency.e2e": stats.e2e_s,
            "gen_ai.latency.time_in_queue": stats.queue_s,
            "jaxserve.num_preemptions": stats.num_preemptions,
        }
        parent = self._parents.pop(stats.request_id, None)
        root = self._tracer.start_span(
            "llm_request", parent, start_time=at(stats.arrival_s), kind=SpanKind.SERVER, attributes=attributes
        )
        context = set_span_in_context(root)
        for name, begin_s, end_s in parts(stats):
            self._tracer.start_span(name, context=context, start_time=at(begin_s)).end(at(end_s))
        root.end(at(stats.ended_s))


class TraceContext:
    """An ASGI layer that reads the client's trace from W3C's headers `traceparent` and `tracestate`."""

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._extract = TraceContextTextMapPropagator().extract

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            given = headers.getlist("traceparent")
            if len(given) == 1:  # the others are unclear, and begin a trace of their own
                carrier = {"traceparent": given[0], "tracestate": ",".join(headers.getlist("tracestate"))}
                _parent.set(self._extract(carrier))
        await self._app(scope, receive, send)


def parts(stats: FinishedStats) -> Iterator[Part]:
    """A request's time in parts that leave nothing out: queue, each chunk of the prompt, decode, detokenize.

    The first token comes with the last chunk. Text is made while later steps run; what counts as detokenize is the time from the
    last token's arrival on the host to the end.
    """
    scheduled = stats.ended_s if stats.scheduled_s is None else stats.scheduled_s
    yield "queue", stats.arrival_s, scheduled
    if stats.scheduled_s is None:
        return
    last = stats.ended_s if stats.last_token_s is None else stats.last_token_s
    first = last if stats.first_token_s is None else stats.first_token_s
    begin = scheduled
    for end in [*(end for end in stats.chunk_ends_s if scheduled < end < first), first]:
        yield "prefill", begin, end
        begin = end
    yield "decode", first, last
    yield "detokenize", last, stats.ended_s


def trace_to(endpoint: str, observer: Observer, model_name: str) -> Tracing:
    """Sends traces to a collector.

    Raises:
        ConfigError: the OpenTelemetry packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as e:
        raise ConfigError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'jaxserve[otel]'") from e
    return Tracing(observer, make_provider(OTLPSpanExporter(endpoint=endpoint), model_name))


def make_provider(exporter: SpanExporter, model_name: str) -> TracerProvider:
    """Hands spans to an exporter, in batches."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "jaxserve", "gen_ai.request.model": model_name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
