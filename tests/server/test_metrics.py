"""EngineMetrics: names as vLLM's, values as reported."""

from __future__ import annotations

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from jaxserve.metrics import FinishedStats, StepStats, TokenStats
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.metrics import EngineMetrics
from tests.server.conftest import Serve
from tests.server.fake_engine import MAX_MODEL_LEN, FakeEngine

STEP = StepStats(
    num_running=3, num_waiting=2, kv_usage=0.25, num_prompt_tokens=100, num_generation_tokens=7, num_preemptions=1, prefix_queries=64,
    prefix_hits=16,
)  # fmt: skip
FINISHED = FinishedStats(
    finish_reason="length", num_prompt_tokens=100, num_generation_tokens=7, num_cached_tokens=16, max_tokens=7, n=2, e2e_s=1.5,
    queue_s=0.2, prefill_s=0.3, decode_s=1.0, request_id="r", num_preemptions=0, arrival_s=10.0, scheduled_s=10.2, first_token_s=10.5,
    last_token_s=11.5, ended_s=11.5, chunk_ends_s=(10.3, 10.4, 10.5),
)  # fmt: skip


def scrape(metrics: EngineMetrics) -> dict[str, float]:
    """What /metrics shows: sample name with its labels but the model's -> value."""
    client = TestClient(create_app(FakeEngine(), ServerConfig(), metrics=metrics), base_url="http://127.0.0.1")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name", "m") == "m"
            samples[sample.name + "".join(f"{{{k}={v}}}" for k, v in labels.items())] = sample.value
    return samples


def test_steps() -> None:
    metrics = EngineMetrics("m")
    metrics.on_step(STEP)
    metrics.on_step(STEP)
    samples = scrape(metrics)
    assert samples["jaxserve:num_requests_running"] == 3
    assert samples["jaxserve:num_requests_waiting"] == 2
    assert samples["jaxserve:kv_cache_usage_perc"] == 0.25
    assert samples["jaxserve:prompt_tokens_total"] == 200
    assert samples["jaxserve:generation_tokens_total"] == 14
    assert samples["jaxserve:num_preemptions_total"] == 2
    assert samples["jaxserve:prefix_cache_queries_total"] == 128
    assert samples["jaxserve:prefix_cache_hits_total"] == 32


def test_finished_requests() -> None:
    metrics = EngineMetrics("m")
    metrics.on_finished(FINISHED)
    samples = scrape(metrics)
    assert samples["jaxserve:request_success_total{finished_reason=length}"] == 1
    assert samples["jaxserve:request_success_total{finished_reason=stop}"] == 0
    sums = {"e2e_request_latency": 1.5, "request_queue_time": 0.2, "request_prefill_time": 0.3, "request_decode_time": 1.0}
    for name, value in sums.items():
        assert samples[f"jaxserve:{name}_seconds_sum"] == value
    for name, value in {"prompt_tokens": 100, "generation_tokens": 7, "params_max_tokens": 7, "params_n": 2}.items():
        assert samples[f"jaxserve:request_{name}_sum"] == value


def test_tokens() -> None:
    metrics = EngineMetrics("m")
    metrics.on_tokens(TokenStats(is_first=True, seconds=0.5))
    for seconds in (0.001, 0.0011, 0.02, 99.0):
        metrics.on_tokens(TokenStats(is_first=False, seconds=seconds))
    samples = scrape(metrics)
    assert samples["jaxserve:time_to_first_token_seconds_count"] == 1
    assert samples["jaxserve:inter_token_latency_seconds_count"] == 4
    assert samples["jaxserve:inter_token_latency_seconds_sum"] == pytest.approx(99.0221)
    buckets = {
        bound: samples[f"jaxserve:inter_token_latency_seconds_bucket{{le={bound}}}"]
        for bound in ("0.001", "0.0025", "0.02", "10.0", "+Inf")
    }
    assert list(buckets.values()) == [1, 2, 3, 3, 4]  # a bucket holds its upper bound


def test_two_models_in_one_process() -> None:
    first, second = EngineMetrics("m"), EngineMetrics("m")
    first.on_step(STEP)
    assert scrape(second)["jaxserve:num_requests_running"] == 0


def test_more_of_finished_requests() -> None:
    metrics = EngineMetrics("m")
    metrics.on_finished(FINISHED)
    samples = scrape(metrics)
    assert samples["jaxserve:request_inference_time_seconds_sum"] == 1.3
    assert samples["jaxserve:request_time_per_output_token_seconds_sum"] == pytest.approx(1 / 6)
    assert samples["jaxserve:request_num_preemptions_count"] == 1


def test_options_as_labels() -> None:
    (name,) = [name for name in scrape(EngineMetrics("m")) if name.startswith("jaxserve:cache_config_info")]
    assert "{block_size=16}" in name and f"{{max_model_len={MAX_MODEL_LEN}}}" in name


def test_alias(serve: Serve) -> None:
    lines = httpx.get(f"{serve(FakeEngine(), metrics_alias='vllm')}/metrics").text.splitlines()
    own, again = ({line.removeprefix(p) for line in lines if line.startswith(p)} for p in ("jaxserve:", "vllm:"))
    assert own == again and len(own) > 100
    assert list(text_string_to_metric_families("\n".join(lines)))


def test_http_requests(serve: Serve) -> None:
    engine = FakeEngine()
    url = serve(engine, rate_limit=60)
    engine.queue_limit = 0
    httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
    for path in ("/v1/models/a", "/v1/models/b", "/nowhere/1", "/nowhere/2"):
        httpx.get(url + path)
    engine.queue_limit = 9
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
    with httpx.Client(base_url=url) as client:
        while client.get("/nowhere").status_code != 429:
            pass
    time.sleep(1.5)
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    requests = {tuple(s.labels.values()): s.value for s in samples if s.name == "http_requests_total"}
    assert requests.pop(("none", "GET", "4xx")) > 50
    expected = {("/v1/completions", "POST", "4xx"): 1, ("/v1/models/{name:path}", "GET", "4xx"): 2}
    assert requests == expected | {("/v1/completions", "POST", "2xx"): 1}
    rejected = {s.labels["reason"]: s.value for s in samples if s.name == "jaxserve:admission_rejections_total"}
    assert rejected == {"queue_full": 1, "rate_limit_exceeded": 1}
