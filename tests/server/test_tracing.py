"""Traces, as a collector gets them."""

import builtins
import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from octavo.errors import ConfigError
from octavo.params import SamplingParams
from octavo.server.timing import Origin, Timing
from octavo.server.tracing import FLUSH_SECONDS, Tracer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Its address, and what it has got."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def timing(now: float, origin: Origin | None = None) -> Timing:
    made = Timing("0.ab.7", now - 4.0, SamplingParams(max_tokens=12, n=2, temperature=0.5, top_p=0.75), 5, origin)
    made.begun, made.first, made.last, made.cached_tokens = now - 3.5, now - 2.5, now - 0.5, 3
    made.counts, made.reasons = [4, 6], ["stop", "length"]
    return made


def spans(timings: list[tuple[Timing, float]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SDK_DISABLED", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    with collector() as (address, got):
        tracer = Tracer(address, "small")
        for one, now in timings:
            tracer.closed(one, now)
        tracer.close()
    names = {value.value.string_value for request in got for resource in request.resource_spans
             for value in resource.resource.attributes if value.key == "service.name"}
    assert names <= {"octavo"}
    return [span for request in got for resource in request.resource_spans for scope in resource.scope_spans
            for span in scope.spans]


def test_a_request_is_a_span_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = time.monotonic(), time.time()
    (span,) = spans([(timing(now, Origin("req-1")), now)], monkeypatch)
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    assert [v.string_value for v in values.pop("gen_ai.response.finish_reasons").values] == ["stop", "length"]
    assert values == {key: pytest.approx(value) if isinstance(value, float) else value for key, value in {
        "gen_ai.response.model": "small", "gen_ai.request.id": "req-1", "gen_ai.request.n": 2, "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.75, "gen_ai.usage.prompt_tokens": 5,
        "gen_ai.usage.cached_tokens": 3, "gen_ai.usage.completion_tokens": 10, "gen_ai.usage.num_sequences": 2,
        "gen_ai.latency.time_in_queue": 0.5, "gen_ai.latency.time_to_first_token": 1.5,
        "gen_ai.latency.time_in_model_prefill": 1.0, "gen_ai.latency.time_in_model_decode": 2.0,
        "gen_ai.latency.time_in_model_inference": 3.0, "gen_ai.latency.e2e": 4.0}.items()}
    assert span.name == "llm_request" and not span.parent_span_id
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(4.0, abs=1e-3)
    assert span.end_time_unix_nano / 1e9 == pytest.approx(clock, abs=5.0)


def test_a_request_belongs_to_the_trace_of_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    traced = timing(now, Origin("a", f"00-{TRACE}-{PARENT}-01", "vendor=1"))
    left_out = timing(now, Origin("b", f"00-{TRACE}-{PARENT}-00"))
    nonsense = timing(now, Origin("c", "00-zz-" + "1" * 300, "=,="))
    found = {a.value.string_value: span for span in spans([(one, now) for one in (traced, left_out, nonsense)], monkeypatch)
             for a in span.attributes if a.key == "gen_ai.request.id"}
    assert set(found) == {"a", "c"}
    assert (found["a"].trace_id.hex(), found["a"].parent_span_id.hex()) == (TRACE, PARENT)
    assert found["a"].trace_state == "vendor=1" and not found["c"].parent_span_id


def test_a_request_that_never_began_has_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    one = Timing("r", now - 1.0, SamplingParams(max_tokens=None), 5)
    one.reasons = ["abort"]
    (span,) = spans([(one, now)], monkeypatch)
    keys = {a.key for a in span.attributes}
    assert "gen_ai.latency.e2e" in keys and "gen_ai.latency.time_in_queue" not in keys and "gen_ai.request.max_tokens" not in keys


def test_a_collector_that_hangs_costs_a_moment_at_the_end_and_requests_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")  # seconds for each of several batches
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracer = Tracer(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1/traces", "small")
        now = time.monotonic()
        for _ in range(3000):
            tracer.closed(timing(now), now)
        assert time.monotonic() - now < 5.0
        begun = time.monotonic()
        tracer.close()
        assert time.monotonic() - begun < FLUSH_SECONDS + 1.0
    for left in set(threading.enumerate()) - before:  # what they draw from `random` would disturb tests that follow
        left.join(60)
        assert not left.is_alive(), left.name


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://x:4317", "", "/v1/traces"])
def test_an_address_that_is_not_http_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be an http or https address"):
        Tracer(endpoint, "small")


def test_without_the_extra_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint needs OpenTelemetry: pip install 'octavo\[otel\]'"):
        Tracer("http://localhost:4318/v1/traces", "small")
