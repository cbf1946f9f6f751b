"""Metrics: names and buckets as promised, what is counted when, one answer for several processes."""

import asyncio
import json
import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from border import Front, LoopThread, request, until
from fake_service import make_service
from fakes import Bench
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from octavo.config import EngineConfig
from octavo.engine.stats import Stats
from octavo.params import SamplingParams
from octavo.plan import GroupInfo
from octavo.server import heart
from octavo.server.config import ServerConfig
from octavo.server.faults import FaultyGroup
from octavo.server.ipc import Heartbeat
from octavo.server.metric_names import FAMILIES
from octavo.server.metrics import TICK, Metrics
from octavo.server.observers import Observers
from octavo.server.service import Ask
from octavo.server.timing import Timing

ROOT = Path(__file__).parents[2]
LABELS = {"model_name": "m", "engine": "0"}
INFO = GroupInfo(num_blocks=100, num_host_blocks=40, block_bytes=1, block_size=16, max_model_len=2048, max_num_seqs=8,
                 max_num_batched_tokens=64, vocab_size=300, device="cpu")

FIRST = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
NEXT = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
WHOLE = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0"
TOKENS = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0 2000.0"
STEP = "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0"

# What vLLM's dashboards and autoscalers read: name of the sample, kind, labels beside model_name and engine, buckets.
PROMISED = [
    ("num_requests_running", "gauge", "", ""), ("num_requests_waiting", "gauge", "", ""),
    ("num_requests_waiting_by_reason", "gauge", "reason", ""), ("kv_cache_usage_perc", "gauge", "", ""),
    ("gpu_cache_usage_perc", "gauge", "", ""), ("num_preemptions_total", "counter", "", ""),
    ("prompt_tokens_total", "counter", "", ""), ("generation_tokens_total", "counter", "", ""),
    ("prompt_tokens_by_source_total", "counter", "source", ""), ("prompt_tokens_cached_total", "counter", "", ""),
    ("prompt_tokens_recomputed_total", "counter", "", ""), ("prefix_cache_queries_total", "counter", "", ""),
    ("prefix_cache_hits_total", "counter", "", ""), ("gpu_prefix_cache_queries_total", "counter", "", ""),
    ("gpu_prefix_cache_hits_total", "counter", "", ""), ("request_success_total", "counter", "finished_reason", ""),
    ("iteration_tokens_total", "histogram", "", STEP), ("time_to_first_token_seconds", "histogram", "", FIRST),
    ("inter_token_latency_seconds", "histogram", "", NEXT), ("time_per_output_token_seconds", "histogram", "", NEXT),
    ("request_time_per_output_token_seconds", "histogram", "", NEXT), ("e2e_request_latency_seconds", "histogram", "", WHOLE),
    ("request_queue_time_seconds", "histogram", "", WHOLE), ("request_prefill_time_seconds", "histogram", "", WHOLE),
    ("request_decode_time_seconds", "histogram", "", WHOLE), ("request_inference_time_seconds", "histogram", "", WHOLE),
    ("request_prompt_tokens", "histogram", "", TOKENS), ("request_generation_tokens", "histogram", "", TOKENS),
    ("request_params_max_tokens", "histogram", "", TOKENS), ("request_max_num_generation_tokens", "histogram", "", TOKENS),
    ("request_prefill_kv_computed_tokens", "histogram", "", TOKENS),
    ("request_params_n", "histogram", "", "1.0 2.0 5.0 10.0 20.0"),
]
ABSENT = ("sleep", "lora", "spec_decode", "mm_cache", "external", "corrupted", "kv_block_lifetime", "estimated_flops",
          "repetition")


@dataclass
class FakeClient:
    """What Metrics reads of an EngineClient."""

    stats: Stats | None = field(default_factory=Stats)
    info: GroupInfo | None = INFO
    epoch: int = 0
    phase: str = "ready"
    num_unsent: int = 0
    cut_off: int = 0

    @property
    def last(self) -> Heartbeat:
        return Heartbeat(epoch=self.epoch, pid=os.getpid(), phase=self.phase, progress=1.0, sent=0.0, cut_off=self.cut_off,
                         stats=self.stats, info=self.info)

    def heartbeat_age(self) -> float:
        return 0.5

    def step_age(self) -> float:
        return 0.25


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scraped:
    """An answer of /metrics."""

    def __init__(self, text: str, parse: Callable[[str], Any] = parser.text_string_to_metric_families) -> None:
        self.families = {family.name: family for family in parse(text)}
        samples = [sample for family in self.families.values() for sample in family.samples]
        self.samples: Samples = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
        assert len(samples) == len(self.samples), "a sample stands there twice"

    def __call__(self, name: str, **labels: str) -> float:
        labels = labels if ":" not in name else {**LABELS, **labels}
        return self.samples[name, frozenset(labels.items())]

    def named(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for (other, labels) in self.samples if other == name]


async def get(metrics: Metrics, accept: str = "") -> tuple[dict[str, str], str]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("no body is wanted")

    scope = {"type": "http", "method": "GET", "headers": [(b"accept", accept.encode())] if accept else []}
    await metrics.serve(scope, receive, send)
    assert sent[0]["status"] == 200
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}, sent[1]["body"].decode()


async def scrape(metrics: Metrics) -> Scraped:
    return Scraped((await get(metrics))[1])


def make(directory: Path, number: int = 0, *, client: FakeClient | None = None, **server: Any) -> Metrics:
    made = Metrics(EngineConfig(model="m"), ServerConfig(**server), directory, number)
    if client is not None:
        made.heartbeat(client)  # type: ignore[arg-type]
    return made


def in_loop(test: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        asyncio.run(test(tmp_path))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def timing(**values: Any) -> Timing:
    made = Timing("r", 100.0, SamplingParams(max_tokens=10, n=values.pop("n", 1)), 7)
    for name, value in values.items():
        setattr(made, name, value)
    return made


@in_loop
async def test_every_promised_metric_is_there_with_its_labels_and_buckets(tmp_path: Path) -> None:
    metrics = make(tmp_path, client=FakeClient())
    scraped = await scrape(metrics)
    for prefix in ("octavo:", "vllm:"):
        for name, kind, extra, buckets in PROMISED:
            full = prefix + name
            family = scraped.families[full.removesuffix("_total") if kind == "counter" else full]
            assert family.type == kind, full
            shown = {"counter": full, "gauge": full, "histogram": f"{full}_bucket"}[kind]
            labels = scraped.named(shown)
            assert labels and all({**label, **LABELS} == label for label in labels), full
            assert all(set(label) - {"le"} == {*LABELS, *extra.split()} for label in labels), full
            if buckets:
                assert [s.labels["le"] for s in family.samples if s.name == shown] == [*buckets.split(), "+Inf"], full
                assert scraped(f"{full}_count") == scraped(f"{full}_sum") == 0.0
        (config,) = scraped.named(f"{prefix}cache_config_info")
        assert config["block_size"] == "16" and config["num_gpu_blocks"] == "100" and config["engine"] == "0"
        assert set(config) >= {"cache_dtype", "gpu_memory_utilization", "enable_prefix_caching", "kv_cache_memory_bytes"}
    reasons = {label["finished_reason"] for label in scraped.named("vllm:request_success_total")}
    assert reasons == {"stop", "length", "abort", "error"}
    assert not [name for name in scraped.families for part in ABSENT if part in name]
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"):
        assert scraped(name) > 0
    assert scraped("python_gc_collections_total", generation="0") >= 0 and scraped.named("python_info")
    metrics.close()


@in_loop
async def test_without_the_names_of_vllm_only_ours_are_there(tmp_path: Path) -> None:
    metrics = make(tmp_path, metrics_compat="none", served_model_name=("small", "other"))
    scraped = await scrape(metrics)
    assert not [name for name in scraped.families if name.startswith("vllm:")]
    assert {"model_name": "small", "engine": "0"} in scraped.named("octavo:num_requests_running")
    assert not scraped.named("octavo:cache_config_info")  # not before the engine is there
    metrics.close()


@in_loop
async def test_openmetrics_is_for_who_asks_for_it(tmp_path: Path) -> None:
    metrics = make(tmp_path, client=FakeClient())
    metrics.http({"method": "GET", "headers": []}, 200, 0.1)
    headers, text = await get(metrics, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert headers["content-type"].startswith("application/openmetrics-text") and text.endswith("# EOF\n")
    scraped = Scraped(text, openmetrics_parser.text_string_to_metric_families)
    assert scraped("vllm:request_success_total", finished_reason="stop") == 0.0
    headers, text = await get(metrics, "*/*")
    assert headers["content-type"].startswith("text/plain; version=0.0.4") and "# EOF" not in text
    metrics.close()


@in_loop
async def test_ten_requests_of_ten_tokens(tmp_path: Path) -> None:
    service, link = make_service(lambda request, index: [5 + i for i in range(10)])
    metrics = make(tmp_path, client=FakeClient())
    service.observer = Observers(metrics, service.config, service.server)

    async def one() -> None:
        ask = Ask({"prompt_token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}, SamplingParams(max_tokens=10, ignore_eos=True))
        with service.admission.enter() as ticket:
            async with await service.open(ticket, [ask]) as stream:
                async for _ in stream:
                    pass

    await asyncio.gather(*(one() for _ in range(10)))
    scraped = await scrape(metrics)
    for prefix in ("octavo:", "vllm:"):
        assert scraped(f"{prefix}time_to_first_token_seconds_count") == 10
        assert scraped(f"{prefix}inter_token_latency_seconds_count") == 90
        assert scraped(f"{prefix}time_per_output_token_seconds_count") == 90
        for name in ("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                     "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"):
            assert scraped(f"{prefix}{name}_count") == 10, name
        assert scraped(f"{prefix}prompt_tokens_total") == 90 and scraped(f"{prefix}generation_tokens_total") == 100
        assert scraped(f"{prefix}request_prompt_tokens_sum") == 90 and scraped(f"{prefix}request_generation_tokens_sum") == 100
        assert scraped(f"{prefix}request_generation_tokens_bucket", le="5.0") == 0
        assert scraped(f"{prefix}request_generation_tokens_bucket", le="10.0") == 10
        assert scraped(f"{prefix}request_params_max_tokens_sum") == 100 and scraped(f"{prefix}request_params_n_sum") == 10
        assert scraped(f"{prefix}request_max_num_generation_tokens_sum") == 100
        assert scraped(f"{prefix}request_success_total", finished_reason="length") == 10
        assert scraped(f"{prefix}prompt_tokens_cached_total") == 80  # as the fake engine says
        assert scraped(f"{prefix}prompt_tokens_by_source_total", source="local_compute") == 10
        assert scraped(f"{prefix}request_prefill_kv_computed_tokens_sum") == 10
    await asyncio.gather(*link.tasks)
    service.close()
    metrics.close()


@in_loop
async def test_a_client_that_leaves_counts_once_per_continuation(tmp_path: Path) -> None:
    service, link = make_service(lambda request, index: [5] * (3 if index == 0 else 50), hold=asyncio.Event())
    metrics = make(tmp_path, client=FakeClient())
    service.observer = Observers(metrics, service.config, service.server)
    metrics.watch(service, SimpleNamespace(num_connections=3))
    ask = Ask({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=40, n=3, temperature=1.0, ignore_eos=True))
    with service.admission.enter() as ticket:
        async with await service.open(ticket, [ask]) as stream:
            scraped = await scrape(metrics)
            assert scraped.samples["octavo:open_requests", frozenset({("model_name", "m")})] == 1
            assert scraped.samples["octavo:open_connections", frozenset({("model_name", "m")})] == 3
            link.hold.set()
            async for _ in stream:
                if len(stream.opened[0].timing.reasons):
                    break
    scraped = await scrape(metrics)
    assert scraped("vllm:request_success_total", finished_reason="length") == 1
    assert scraped("vllm:request_success_total", finished_reason="abort") == 2
    assert scraped("vllm:request_generation_tokens_count") == 3 and scraped("vllm:request_params_n_sum") == 3
    assert scraped("vllm:e2e_request_latency_seconds_count") == 1
    assert scraped.samples["octavo:open_requests", frozenset({("model_name", "m")})] == 0
    await asyncio.gather(*link.tasks)
    service.close()
    metrics.close()


@in_loop
async def test_the_parts_of_a_request_add_up(tmp_path: Path) -> None:
    metrics = make(tmp_path, client=FakeClient())
    one = timing(begun=101.0)
    metrics.token(one, 103.0, 1)
    one.first = one.last = 103.0
    for moment in (103.02, 103.04, 107.0):
        metrics.token(one, moment, 1)
        one.last = moment
    one.counts = [4]
    metrics.closed(one, 108.0)
    scraped = await scrape(metrics)
    sums = {"time_to_first_token_seconds": 3.0, "inter_token_latency_seconds": 4.0, "request_queue_time_seconds": 1.0,
            "request_prefill_time_seconds": 2.0, "request_decode_time_seconds": 4.0, "request_inference_time_seconds": 6.0,
            "request_time_per_output_token_seconds": 4.0 / 3, "e2e_request_latency_seconds": 8.0}
    for name, seconds in sums.items():
        assert scraped(f"vllm:{name}_sum") == pytest.approx(seconds), name
    assert scraped("vllm:inter_token_latency_seconds_bucket", le="0.01") == 0
    assert scraped("vllm:inter_token_latency_seconds_bucket", le="0.025") == 2
    assert scraped("vllm:inter_token_latency_seconds_bucket", le="5.0") == 3
    metrics.close()


@in_loop
async def test_bounds_belong_to_their_buckets(tmp_path: Path) -> None:
    metrics = make(tmp_path, client=FakeClient())
    for tokens in (1, 2, 3, 5000):
        one = timing()
        one.prompt_tokens = tokens
        metrics.closed(one, 101.0)
    scraped = await scrape(metrics)
    counts = {le: scraped("vllm:request_prompt_tokens_bucket", le=le) for le in ("1.0", "2.0", "5.0", "2000.0", "+Inf")}
    assert counts == {"1.0": 1, "2.0": 2, "5.0": 3, "2000.0": 3, "+Inf": 4}
    metrics.close()


@in_loop
async def test_the_engine_counts_on_when_it_is_started_again(tmp_path: Path) -> None:
    client = FakeClient(Stats(
        running=3, waiting=5, compiling=2, swapped=1, kv_blocks=100, kv_used=25, kv_cached=50, host_used=10, prefix_queries=64,
        prefix_hits=32, prefix_again=16, prompt_tokens=40, generated_tokens=8, steps=6, preempted_swap=1, preempted_recompute=2))
    client.stats.note_step(100, 4)
    client.cut_off = 2
    metrics = make(tmp_path, client=client)
    metrics.heartbeat(client)  # the same again changes nothing
    scraped = await scrape(metrics)
    values = {"num_requests_running": 3, "num_requests_waiting": 5, "kv_cache_usage_perc": 0.25, "gpu_cache_usage_perc": 0.25,
              "cpu_cache_usage_perc": 0.25, "num_requests_swapped": 1, "num_preemptions_total": 3,
              "prefix_cache_queries_total": 64, "gpu_prefix_cache_hits_total": 32, "prompt_tokens_recomputed_total": 16,
              "iteration_tokens_total_sum": 152, "iteration_tokens_total_count": 1}
    for name, value in values.items():
        assert scraped(f"vllm:{name}") == scraped(f"octavo:{name}") == value, name
    assert scraped("vllm:iteration_tokens_total_bucket", le="64.0") == 0
    assert scraped("vllm:iteration_tokens_total_bucket", le="128.0") == 1
    assert scraped("vllm:num_requests_waiting_by_reason", reason="capacity") == 3
    assert scraped("vllm:num_requests_waiting_by_reason", reason="deferred") == 2
    assert [scraped("octavo:kv_blocks", state=state) for state in ("used", "cached", "free")] == [25, 50, 25]
    assert scraped("octavo:engine_clients_cut_off_total") == 2 and scraped("octavo:engine_steps_total") == 6
    assert scraped("octavo:engine_step_seconds") == 0.25 and scraped("octavo:engine_heartbeat_age_seconds") == 0.5

    client.phase, client.stats = "down", None
    scraped = await scrape(metrics)
    assert scraped("octavo:engine_ready") == scraped("vllm:num_requests_running") == scraped("vllm:kv_cache_usage_perc") == 0
    assert scraped("vllm:num_preemptions_total") == 3
    # The next one has done more than the last one when it is first heard of.
    client.phase, client.epoch, client.cut_off, client.stats = "ready", 1, 0, Stats(prefix_queries=100, preempted_swap=1)
    metrics.heartbeat(client)
    metrics.watch_restarts(lambda: {("engine", "SIGKILL"): 1})
    scraped = await scrape(metrics)
    assert scraped("vllm:prefix_cache_queries_total") == 164 and scraped("vllm:num_preemptions_total") == 4
    assert scraped("octavo:engine_clients_cut_off_total") == 2 and scraped("octavo:engine_ready") == 1
    restarts = frozenset({("model_name", "m"), ("process", "engine"), ("cause", "SIGKILL")})
    assert scraped.samples["octavo:process_restarts_total", restarts] == 1
    metrics.close()


@in_loop
async def test_http_calls_are_counted_by_route_and_what_clients_make_up_is_one(tmp_path: Path) -> None:
    metrics = make(tmp_path)
    route = SimpleNamespace(path="/v1/models/{model:path}")

    def call(path: str, status: int, seconds: float, method: str = "GET", **scope: Any) -> None:
        metrics.http({"method": method, "path": path, "headers": [(b"content-length", b"30")],
                      "state": {"response_bytes": 500}, **scope}, status, seconds)

    call("/v1/models/a", 200, 0.05, route=route)
    call("/v1/models/b", 404, 0.7, route=route)
    for i in range(100):
        call(f"/wp-admin/{i}", 404, 0.001, method=f"M{i}")
    metrics.http({"method": "POST", "path": "/x", "headers": [(b"content-length", b"nonsense")]}, 499, 99.0)
    scraped = await scrape(metrics)
    handler = "/v1/models/{model:path}"
    assert scraped("http_requests_total", handler=handler, method="GET", status="2xx") == 1
    assert scraped("http_requests_total", handler=handler, method="GET", status="4xx") == 1
    assert scraped("http_requests_total", handler="none", method="other", status="4xx") == 100
    assert len(scraped.named("http_requests_total")) == 4
    bounds = [scraped("http_request_duration_seconds_bucket", handler=handler, method="GET", le=le)
              for le in ("0.1", "0.5", "1.0", "+Inf")]
    assert bounds == [1, 1, 2, 2]
    assert scraped("http_request_duration_highr_seconds_count") == 103
    assert scraped("http_request_duration_highr_seconds_bucket", le="60.0") == 102
    assert scraped("http_request_size_bytes_sum", handler=handler) == 60
    assert scraped("http_response_size_bytes_sum", handler=handler) == 1000
    assert scraped("http_response_size_bytes_count", handler="none") == 101
    metrics.close()


@in_loop
async def test_any_process_answers_for_all_and_totals_never_go_back(tmp_path: Path) -> None:
    client = FakeClient(Stats(running=4, prefix_queries=10))
    first, second = (make(tmp_path, n, client=client, api_server_count=3) for n in (0, 1))
    for metrics, count in ((first, 5), (second, 7)):
        metrics.token(timing(begun=101.0), 102.0, count)
        metrics.watch(SimpleNamespace(
            num_open=count, num_dropped=1, admission=SimpleNamespace(waiting=1, tokens=count, oldest_wait=lambda n=count: n)),
            SimpleNamespace(num_connections=count))
        metrics._look()

    def own(name: str) -> tuple[str, frozenset[tuple[str, str]]]:
        return f"octavo:{name}", frozenset({("model_name", "m")})

    for metrics in (first, second):  # the third is not there yet
        scraped = await scrape(metrics)
        assert scraped("vllm:generation_tokens_total") == 12 and scraped("vllm:time_to_first_token_seconds_count") == 2
        assert scraped("vllm:num_requests_running") == 4 and scraped("vllm:prefix_cache_queries_total") == 10  # once
        assert scraped.samples[own("open_requests")] == 12 and scraped.samples[own("oldest_wait_seconds")] == 7
        assert scraped.samples[own("slow_readers_dropped_total")] == 2
        assert await metrics.num_open() == 12  # and so does /load
        assert {"process": "engine", "model_name": "m"} in scraped.named("octavo:process_threads")
        assert {"process": "api_1", "model_name": "m"} in scraped.named("octavo:process_open_fds")
    second.close()  # or killed: see the next test
    (tmp_path / "metrics-2").write_bytes(b"no sheet")
    scraped = await scrape(first)
    assert scraped("vllm:generation_tokens_total") == 12 and scraped.samples[own("open_requests")] == 5
    again = make(tmp_path, 1, client=client, api_server_count=3)
    again.token(timing(), 102.0, 1)
    scraped = await scrape(first)
    assert scraped("vllm:generation_tokens_total") == 13 and scraped.samples[own("open_requests")] == 5
    first.close()
    again.close()


@in_loop
async def test_a_process_that_stands_still_holds_nobody_up(tmp_path: Path) -> None:
    first, second = (make(tmp_path, n, client=FakeClient(), api_server_count=2) for n in (0, 1))
    second.token(timing(), 102.0, 3)
    second._set(next(f for f in FAMILIES if f.name == "open_requests"), 9)
    second._timer.cancel()
    second._cells[second._alive] = time.monotonic() - 60.0
    begun = time.monotonic()
    scraped = await scrape(first)
    assert time.monotonic() - begun < 0.5
    assert scraped("octavo:generation_tokens_total") == 3
    assert scraped.samples["octavo:open_requests", frozenset({("model_name", "m")})] == 0
    first.close()
    second.close()


@in_loop
async def test_a_thousand_labels_do_not_break_a_sheet(tmp_path: Path) -> None:
    metrics = make(tmp_path)
    for i in range(20_000):
        metrics.http({"method": "GET", "headers": [], "route": SimpleNamespace(path=f"/{i}")}, 200, 0.1)
    scraped = await scrape(metrics)
    assert 100 < len(scraped.named("http_requests_total")) < 20_000
    assert scraped("http_request_duration_highr_seconds_count") == 20_000
    assert scraped("octavo:generation_tokens_total") == 0
    metrics.close()


@in_loop
async def test_a_token_costs_next_to_nothing(tmp_path: Path) -> None:
    metrics, one = make(tmp_path), timing(begun=101.0, first=102.0, last=103.0)
    best = 1.0
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(10_000):
            metrics.token(one, 103.02, 1)
        best = min(best, (time.perf_counter() - begun) / 10_000)
    assert best < 3e-6
    metrics.close()


@in_loop
async def test_a_late_event_loop_shows(tmp_path: Path) -> None:
    metrics = make(tmp_path)
    await asyncio.sleep(0)
    time.sleep(TICK + 0.3)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    scraped = await scrape(metrics)
    counts = {le: scraped.samples["octavo:event_loop_lag_seconds_bucket", frozenset({("model_name", "m"), ("le", le)})]
              for le in ("0.25", "+Inf")}
    assert counts["+Inf"] - counts["0.25"] == 1
    metrics.close()


@in_loop
async def test_gauges_of_a_real_loop_are_zero_within_a_second_of_the_last_abort(tmp_path: Path) -> None:
    bench = Bench(overlap=True)
    bench.engine._group = FaultyGroup(bench.group, "slow_step:0.02")
    interval, heart.INTERVAL = heart.INTERVAL, 30.0  # what comes sooner comes because the loop says so
    try:
        with LoopThread(bench.engine, tmp_path) as thread, Front(tmp_path) as front:
            await until(lambda: (thread.vitals.changed.set(), front.client.ready)[1])
            metrics = make(tmp_path)
            front.client._on_heartbeat = lambda: metrics.heartbeat(front.client)
            for i in range(4):
                front.client.add(request(f"r{i}", [5] * 20, max_tokens=200))
            await until(lambda: len(front.tokens) == 4)
            await until(lambda: (thread.vitals.changed.set(), (front.client.stats or Stats()).running == 4)[1])
            assert (await scrape(metrics))("vllm:num_requests_running") == 4
            for i in range(4):
                front.client.abort(f"r{i}")
            begun = time.monotonic()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            while any([(await scrape(metrics))(f"vllm:{name}") for name in names]):
                await asyncio.sleep(0.01)
                assert time.monotonic() - begun < 10.0
            assert time.monotonic() - begun < 1.0
            scraped = await scrape(metrics)
            assert scraped("vllm:iteration_tokens_total_sum") > 80
            assert scraped("vllm:iteration_tokens_total_count") <= scraped("octavo:engine_steps_total")
            metrics.close()
    finally:
        heart.INTERVAL = interval


def test_the_page_of_metrics_says_what_the_code_says() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    labels = [(f.shown, f.kind, " ".join(f"`{label}`" for label in (*f.base, *f.labels)).strip()) for f in FAMILIES]
    assert [(name, kind, given.strip()) for name, kind, given, _ in rows] == labels
    assert all(meaning.strip() for *_, meaning in rows)
    for family in FAMILIES:
        assert all(f"`{alias}" in page for alias in family.aliases), family.name


@in_loop
async def test_the_dashboard_asks_for_metrics_that_exist(tmp_path: Path) -> None:
    metrics = make(tmp_path, client=FakeClient())
    metrics.http({"method": "GET", "headers": []}, 200, 0.1)
    metrics.watch_restarts(lambda: {("engine", "SIGKILL"): 1})
    scraped = await scrape(metrics)
    known = {name for name, _ in scraped.samples}
    board = json.loads((ROOT / "examples" / "grafana" / "octavo.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\b(?:octavo:|http_|process_|python_)[a-z_0-9]+", query)}
    assert len(asked) > 25 and not asked - known, asked - known
    assert all(panel["targets"] for panel in board["panels"] if panel["type"] != "row")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    metrics.close()
