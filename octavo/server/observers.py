"""Observers: the metrics, and beside them the log and the traces of requests where these are asked for.

Owns who is told; it does not know what they make of it. Invariant: what comes with every token goes to the metrics alone.
"""

import time
from collections.abc import Sequence

from octavo.config import EngineConfig
from octavo.server.config import ServerConfig
from octavo.server.metrics import Metrics
from octavo.server.request_log import RequestLog
from octavo.server.timing import Timing
from octavo.server.tracing import Tracer


class Observers:
    """The Observer of a service.

    Args:
        metrics: of this process. engine, server: options, which say who else is told.

    Raises:
        ConfigError: traces are asked for and cannot be made.
    """

    def __init__(self, metrics: Metrics, engine: EngineConfig, server: ServerConfig) -> None:
        self.token, self.finished, self._metrics = metrics.token, metrics.finished, metrics
        self._others: list[RequestLog | Tracer] = []
        self._tracer: Tracer | None = None
        if server.enable_log_requests:
            self._others.append(RequestLog(server.max_log_len))
        if server.otlp_traces_endpoint is not None:
            self._tracer = Tracer(server.otlp_traces_endpoint, (server.served_model_name or (str(engine.model),))[0])
            self._others.append(self._tracer)

    def opened(self, timing: Timing, prompt: str | None, prompt_token_ids: Sequence[int]) -> None:
        """A request was sent to the engine."""
        for other in self._others:
            other.opened(timing, prompt, prompt_token_ids)

    def closed(self, timing: Timing) -> None:
        """A request is over."""
        now = time.monotonic()
        self._metrics.closed(timing, now)
        for other in self._others:
            other.closed(timing, now)

    def close(self) -> None:
        """Send the last traces."""
        if self._tracer is not None:
            self._tracer.close()
