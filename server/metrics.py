"""EngineMetrics: what the engine reports, as Prometheus metrics. vLLM's names and labels under the prefix `jaxserve:`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.config import EngineConfig
from jaxserve.metrics import FinishedStats, StepStats, TokenStats

PREFIX = "jaxserve:"
_MODEL = ["model_name"]
_REJECTIONS = ("queue_full", "rate_limit_exceeded")  # codes of errors

_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
)  # fmt: skip
_REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_N = (0, 1, 2, 5, 10, 20, 50, 100)


class EngineMetrics:
    """An Observer (jaxserve/metrics.py) with a registry of its own, so that one process may have several.

    Attributes:
        registry: the engine's metrics; `text` shows them under each prefix.
        http_registry: those of the HTTP layer, which have none.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.http_registry = CollectorRegistry()
        self._model_name = model_name
        self._last_step = StepStats(0, 0, 0.0, 0, 0, 0, 0, 0)

        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for a place in the batch.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV pool's pages in use, 0 to 1.")

        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter("generation_tokens", "Output tokens.")
        self._preemptions = self._counter("num_preemptions", "Requests put back in the queue for want of pages.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        success = Counter(
            PREFIX + "request_success", "Requests that ended, by why.", [*_MODEL, "finished_reason"], registry=self.registry
        )
        self._success = {reason: success.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}

        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_SECONDS
        )
        self._inter_token = QuickHistogram(
            PREFIX + "inter_token_latency_seconds", "From one output of a request to its next.", _TOKEN_SECONDS, model_name
        )
        self.registry.register(self._inter_token)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _REQUEST_SECONDS)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _REQUEST_SECONDS
        )
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _REQUEST_SECONDS)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._request_generation = self._histogram("request_generation_tokens", "Output tokens of a request.", _TOKENS)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", _TOKENS)
        self._n = self._histogram("request_params_n", "n of a request.", _N)
        self._iteration_tokens = self._histogram("iteration_tokens_total", "Tokens computed in a step.", _TOKENS)
        self._inference = self._histogram(
            "request_inference_time_seconds", "From the first step to the last token.", _REQUEST_SECONDS
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time of a request's tokens after its first.", _TOKEN_SECONDS
        )
        self._request_preemptions = self._histogram("request_num_preemptions", "How often a request was put back.", _N)
        rejections = Counter(
            PREFIX + "admission_rejections",
            "Requests refused because of the load, by why.",
            [*_MODEL, "reason"],
            registry=self.registry,
        )
        self._rejections = {reason: rejections.labels(model_name, reason) for reason in _REJECTIONS}
        self._http_requests = Counter(
            "http_requests", "HTTP requests, by route and status.", ["handler", "method", "status"], registry=self.http_registry
        )
        self._answers: dict[tuple[str, str, int], Counter] = {}  # finding a label takes longer than counting

    def on_step(self, stats: StepStats) -> None:
        self._last_step = stats
        self._iteration_tokens.observe(stats.num_prompt_tokens + stats.num_generation_tokens)
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        self._prompt_tokens.inc(stats.num_prompt_tokens)
        self._generation_tokens.inc(stats.num_generation_tokens)
        self._preemptions.inc(stats.num_preemptions)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)

    def set_cache_config(self, config: EngineConfig) -> None:
        """Shows what the engine was built with, as labels."""
        values = {"block_size": config.cache.block_size, "enable_prefix_caching": config.cache.enable_prefix_caching}
        values |= {"max_num_seqs": config.scheduler.max_num_seqs, "max_model_len": config.model.max_model_len}
        info = Gauge(PREFIX + "cache_config_info", "The engine's options.", [*_MODEL, *values], registry=self.registry)
        info.labels(self._model_name, *map(str, values.values())).set(1)

    def on_response(self, handler: str, method: str, status: int, error_code: str | None) -> None:
        """An HTTP request was answered."""
        answer = (handler, method, status // 100)
        counter = self._answers.get(answer)
        if counter is None:
            counter = self._answers[answer] = self._http_requests.labels(handler, method, f"{status // 100}xx")
        counter.inc()
        if error_code in _REJECTIONS:
            self._rejections[error_code].inc()

    def text(self, alias: str | None = None) -> bytes:
        """Everything in Prometheus's format; the engine's metrics a second time under the alias."""
        own = generate_latest(self.registry)
        again = own.replace(PREFIX.encode(), f"{alias}:".encode()) if alias is not None else b""
        return own + again + generate_latest(self.http_registry)

    def load(self) -> dict[str, float]:
        """How busy the engine is, after its last step."""
        last = self._last_step
        return {
            "server_load": last.num_running + last.num_waiting,
            "num_requests_running": last.num_running,
            "num_requests_waiting": last.num_waiting,
            "kv_cache_usage": last.kv_usage,
        }

    def on_tokens(self, stats: TokenStats) -> None:
        if stats.is_first:
            self._first_token.observe(stats.seconds)
        else:
            self._inter_token.observe(stats.seconds, stats.count)

    def on_finished(self, stats: FinishedStats) -> None:
        self._success[stats.finish_reason].inc()
        self._e2e.observe(stats.e2e_s)
        self._queue.observe(stats.queue_s)
        self._prefill.observe(stats.prefill_s)
        self._decode.observe(stats.decode_s)
        self._request_prompt.observe(stats.num_prompt_tokens)
        self._request_generation.observe(stats.num_generation_tokens)
        self._n.observe(stats.n)
        self._inference.observe(stats.prefill_s + stats.decode_s)
        self._request_preemptions.observe(stats.num_preemptions)
        if stats.num_generation_tokens > 1:
            self._per_token.observe(stats.decode_s / (stats.num_generation_tokens - 1))
        if stats.max_tokens is not None:
            self._max_tokens.observe(stats.max_tokens)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, _MODEL, registry=self.registry).labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, _MODEL, registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, _MODEL, registry=self.registry, buckets=buckets).labels(self._model_name)


class QuickHistogram(Collector):
    """A histogram with one writer: several times cheaper an observation than the library's, and it is seen by every
    request in every step."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], model_name: str) -> None:
        self._name, self._text, self._model_name = name, text, model_name
        self._bounds = list(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=_MODEL)
        totals = accumulate(self._counts)
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        family.add_metric([self._model_name], list(zip(bounds, totals, strict=True)), sum_value=self._sum)
        return [family]
