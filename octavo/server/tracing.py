"""Tracer: a span of OpenTelemetry for every request, sent to a collector over HTTP; needs ``octavo[otel]``.

Owns what a span says; it does not know who else is told. The names are those of the gen_ai conventions, and of vLLM where these
have none. A request of a client that traces is part of the client's trace, and is left out where that was left out.
Invariant: a collector that is slow, wrong or gone costs a request nothing: spans are handed to a thread, which drops what
it cannot send.
"""

import threading
import time
import urllib.parse
from collections.abc import Sequence

from octavo.errors import ConfigError
from octavo.server.timing import Timing

FLUSH_SECONDS = 2.0
"""How long the last spans may take to be sent when the server ends."""


class Tracer:
    """An Observer of ends.

    Args:
        endpoint: of the collector, such as http://localhost:4318/v1/traces; used as it is. model: name in the spans.

    Raises:
        ConfigError: the endpoint is not one, or OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
            raise ConfigError(f"otlp_traces_endpoint must be an http or https address, got {endpoint!r}.", "otlp_traces_endpoint")
        try:  # an optional extra, which takes a while to import and is seldom asked for
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError("otlp_traces_endpoint needs OpenTelemetry: pip install 'octavo[otel]'.",
                              "otlp_traces_endpoint") from error
        resource = Resource({SERVICE_NAME: "octavo"}).merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME wins
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer, self._kind, self._model = self._provider.get_tracer("octavo"), SpanKind.SERVER, model
        self._read_context = TraceContextTextMapPropagator().extract

    def opened(self, timing: Timing, prompt: str | None, prompt_token_ids: Sequence[int]) -> None:
        """A span is written at its end."""

    def closed(self, timing: Timing, now: float) -> None:
        """Write the request's span."""
        origin = timing.origin
        headers = {"traceparent": origin.traceparent, "tracestate": origin.tracestate} if origin is not None else {}
        past = time.time_ns() - int(1e9 * now)  # between the monotonic clock and that of the calendar
        span = self._tracer.start_span(
            "llm_request", self._read_context(headers), self._kind, start_time=past + int(1e9 * timing.arrival))
        if span.is_recording():
            span.set_attributes({name: value for name, value in self._attributes(timing, now).items() if value is not None})
        span.end(past + int(1e9 * now))

    def close(self) -> None:
        """Send what is left, for a moment."""
        # Without a collector, the exporter would try for long; the thread ends with the process.
        last = threading.Thread(target=self._provider.shutdown, name="octavo-traces", daemon=True)
        last.start()
        last.join(FLUSH_SECONDS)

    def _attributes(self, timing: Timing, now: float) -> dict[str, str | int | float | Sequence[str] | None]:
        params, begun, first, last = timing.params, timing.begun, timing.first, timing.last

        def between(start: float | None, end: float | None) -> float | None:
            return None if start is None or end is None else end - start

        return {
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": timing.request_id if timing.origin is None else timing.origin.request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": timing.prompt_tokens,
            "gen_ai.usage.cached_tokens": timing.cached_tokens,
            "gen_ai.usage.completion_tokens": timing.output_tokens,
            "gen_ai.usage.num_sequences": params.n,
            "gen_ai.response.finish_reasons": tuple(timing.reasons),
            "gen_ai.latency.time_in_queue": between(timing.arrival, begun),
            "gen_ai.latency.time_to_first_token": between(timing.arrival, first),
            "gen_ai.latency.time_in_model_prefill": between(begun, first),
            "gen_ai.latency.time_in_model_decode": between(first, last),
            "gen_ai.latency.time_in_model_inference": between(begun, last),
            "gen_ai.latency.e2e": now - timing.arrival,
        }
