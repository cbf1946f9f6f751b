"""Metrics: what one API process measures of its requests and, the first one, of the engine; and the answer of /metrics.

Owns when which number grows; names and buckets are metric_names.py's, the memory they lie in metric_sheet.py's, the text of a
scrape metric_scrape.py's. Any process answers for the whole server: what each one measures is added up, what is the engine's
is written by the first process alone, which lives as long as the server; the engine's counters go on over its restarts.

Invariant: observing a token takes about a microsecond and allocates nothing; nothing here raises into a request.
"""

import asyncio
import gc
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client import exposition as plain
from prometheus_client.openmetrics import exposition as open_metrics
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.config import EngineConfig
from octavo.engine.stats import Stats
from octavo.server import metric_names as names
from octavo.server.config import ServerConfig
from octavo.server.ipc import Heartbeat
from octavo.server.metric_names import FAMILIES, FIXED, Family
from octavo.server.metric_scrape import ALIVE, PID, Scrape
from octavo.server.metric_sheet import PREFIX, Sheet
from octavo.server.remote import EngineClient
from octavo.server.service import Service
from octavo.server.timing import Timing
from octavo.text.grammar import num_checked

TICK = 0.25
"""Seconds between two looks at what is open, and at how late the event loop is."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Others are one label: a client may send anything."""

PLAIN_KIND = "text/plain; version=0.0.4; charset=utf-8"
OPEN_KIND = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Connections(Protocol):
    """What holds the clients' connections."""

    @property
    def num_connections(self) -> int:
        """Open ones."""


class Metrics:
    """Made inside the event loop; one per API process.

    Args:
        engine, server: options. directory: the server's private folder. number: of this process, 0 for the first.
    """

    def __init__(self, engine: EngineConfig, server: ServerConfig, directory: Path, number: int) -> None:
        several = server.api_server_count > 1
        self._sheet = Sheet(directory / f"{PREFIX}{number}" if several else None)
        self._cells, self._number = self._sheet.cells, number
        self._http_rows: dict[tuple[str, str, str], tuple[int, int, int, int]] = {}
        # By cell, the last value of a counter that somebody else keeps: the engine, or something in this process.
        self._engine_seen: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._epoch = -1
        self._client: EngineClient | None = None
        self._service: Service | None = None
        self._connections: Connections | None = None
        self._restarts: Callable[[], Mapping[tuple[str, str], int]] = dict
        self._at = {family.name: self._sheet.row(family.name, (), family.size)
                    for family in FAMILIES if not family.labels and family is not names.CACHE_CONFIG}
        for name, rows in FIXED.items():
            for labels in rows:
                self._sheet.row(name, labels)
        for family in FAMILIES:
            if family.unite:  # what a process before this one had open is not open any more
                self._set(family, 0.0)
        self._alive, pid = self._sheet.row(ALIVE), self._sheet.row(PID)
        self._cells[pid] = os.getpid()
        self._generated, self._next = self._at[names.GENERATED.name], self._at[names.ITL.name]
        self._next_sum = self._next + len(names.NEXT_TOKEN) + 1
        self._scrape = Scrape(engine, server, self._sheet, directory if several else None)
        self._registry = CollectorRegistry()
        self._registry.register(self._scrape)
        ProcessCollector(pid=self._scrape.first_pid, registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._busy = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time()
        self._timer = self._loop.call_soon(self._tick)

    def watch(self, service: Service, connections: Connections) -> None:
        """Look from now on at what is open there."""
        self._service, self._connections = service, connections

    def watch_restarts(self, restarts: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Show what this returns: counts of restarts by (kind of process, cause)."""
        self._restarts = restarts

    def close(self) -> None:
        """Measure no more; what was counted stays for the siblings to see."""
        self._timer.cancel()
        self._cells[self._alive] = 0.0

    # -- requests; see observers.py ------------------------------------------------------------------------------------

    def token(self, timing: Timing, now: float, count: int) -> None:
        """A step brought ``count`` tokens of a request."""
        cells = self._cells
        cells[self._generated] += count
        if timing.last is None:
            self._first_token(timing, now)
        else:
            gap = now - timing.last
            cells[self._next + bisect_left(names.NEXT_TOKEN, gap)] += count
            cells[self._next_sum] += gap * count

    def finished(self, timing: Timing, reason: str) -> None:
        """A continuation has ended."""
        self._cells[self._sheet.row(names.SUCCESS.name, (reason,))] += 1.0

    def closed(self, timing: Timing, now: float) -> None:
        """A request is over: what is known of it as a whole is known now."""
        observe, params = self._observe, timing.params
        observe(names.E2E, now - timing.arrival)
        observe(names.PROMPT_SIZE, timing.prompt_tokens)
        observe(names.COMPUTED, timing.prompt_tokens - timing.cached_tokens)
        observe(names.PARAMS_N, params.n)
        if params.max_tokens is not None:
            observe(names.MAX_TOKENS, params.max_tokens)
        for count in timing.counts:
            observe(names.OUTPUT_SIZE, count)
        observe(names.LONGEST, max(timing.counts))
        begun, first, last = timing.begun, timing.first, timing.last
        if begun is not None:
            observe(names.QUEUE, begun - timing.arrival)
        if begun is not None and first is not None and last is not None:
            observe(names.PREFILL, first - begun)
            observe(names.DECODE, last - first)
            observe(names.INFERENCE, last - begun)
            if (per_sequence := timing.output_tokens / params.n) > 1.0 and last > first:
                observe(names.TPOT, (last - first) / (per_sequence - 1.0))

    # -- the engine ----------------------------------------------------------------------------------------------------

    def heartbeat(self, client: EngineClient) -> None:
        """The engine process has said how it is."""
        self._client = self._scrape.client = client
        if client.info is not None:
            self._scrape.info = client.info
        if self._number == 0 and client.last is not None:
            if client.epoch != self._epoch:  # its counters begin again
                self._epoch = client.epoch
                self._engine_seen.clear()
            self._note_heartbeat(client.last)

    def _note_heartbeat(self, beat: Heartbeat) -> None:
        self._set(names.READY, float(beat.phase == "ready"))
        self._follow(names.CUT_OFF, beat.cut_off)
        self._follow(names.BAD_FRAMES, beat.bad_frames)
        self._note_gauges(beat.stats or Stats())
        if (stats := beat.stats) is None:
            return
        self._follow(names.PREEMPTIONS, stats.preempted_recompute + stats.preempted_swap)
        self._follow(names.QUERIES, stats.prefix_queries)
        self._follow(names.HITS, stats.prefix_hits)
        self._follow(names.RECOMPUTED, stats.prefix_again)
        self._follow(names.STEPS, stats.steps)
        self._follow(names.FAILED_STEPS, stats.failed_steps)
        cell = self._at[names.ITERATION.name]
        for place, count in enumerate([*stats.step_sizes, stats.prompt_tokens + stats.generated_tokens]):
            self._climb(cell + place, count, self._engine_seen)

    def _note_gauges(self, stats: Stats) -> None:
        hosts = self._scrape.info.num_host_blocks if self._scrape.info is not None else 0
        self._set(names.RUNNING, stats.running)
        self._set(names.WAITING, stats.waiting)
        self._set(names.WAITING_BY, stats.waiting - stats.compiling, ("capacity",))
        self._set(names.WAITING_BY, stats.compiling, ("deferred",))
        self._set(names.SWAPPED, stats.swapped)
        self._set(names.KV_USAGE, stats.kv_usage)
        self._set(names.HOST_USAGE, stats.host_used / hosts if hosts else 0.0)
        self._set(names.BLOCKS, stats.kv_used, ("used",))
        self._set(names.BLOCKS, stats.kv_cached, ("cached",))
        self._set(names.BLOCKS, stats.kv_blocks - stats.kv_used - stats.kv_cached, ("free",))

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    def http(self, scope: Scope, status: int, seconds: float) -> None:
        """A request has been answered; ``scope["state"]["response_bytes"]`` says with how much."""
        route = scope.get("route")
        method = scope["method"] if scope["method"] in METHODS else "other"
        handler = "none" if route is None else route.path  # what clients make up must not become labels
        key = (handler, method, f"{status // 100}xx")
        if (rows := self._http_rows.get(key)) is None:
            row = self._sheet.row
            rows = self._http_rows[key] = (
                row(names.HTTP_REQUESTS.name, key), row(names.HTTP_SECONDS.name, key[:2], names.HTTP_SECONDS.size),
                row(names.HTTP_IN.name, key[:1], 2), row(names.HTTP_OUT.name, key[:1], 2))
        cells = self._cells
        cells[rows[0]] += 1.0
        cells[rows[1] + bisect_left(names.HTTP, seconds)] += 1.0
        cells[rows[1] + len(names.HTTP) + 1] += seconds
        self._observe(names.HTTP_FINE_SECONDS, seconds)
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        for cell, size in ((rows[2], int(length) if length.isdigit() else 0),
                           (rows[3], scope.get("state", {}).get("response_bytes", 0))):
            cells[cell] += 1.0
            cells[cell + 1] += size

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /metrics: Prometheus' text, or OpenMetrics for whoever accepts it."""
        accept = next((value for name, value in scope["headers"] if name == b"accept"), b"").decode("latin-1")
        wants_open = "application/openmetrics-text" in accept
        encode, kind = (open_metrics.generate_latest, OPEN_KIND) if wants_open else (plain.generate_latest, PLAIN_KIND)
        async with self._busy:  # one at a time, and in a thread: it takes milliseconds that streams need not wait for
            self._look()
            # Without this escaping the library writes vllm_ for vllm: in OpenMetrics; no name of ours needs any.
            body = await asyncio.to_thread(encode, self._registry, escaping=open_metrics.ALLOWUTF8)
        await Response(body, headers={"content-type": kind, "cache-control": "no-store"})(scope, receive, send)

    async def num_open(self) -> int:
        """Requests that wait or run, in all API processes."""
        self._look()
        return int(await asyncio.to_thread(self._scrape.total, names.OPEN_STREAMS))

    # -- by the clock --------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self._loop.time()
        self._observe(names.LOOP_LAG, max(0.0, now - self._due))
        self._due = now + TICK
        self._timer = self._loop.call_at(self._due, self._tick)
        self._look()

    def _look(self) -> None:
        """Write down what is open now."""
        self._cells[self._alive] = time.monotonic()
        service, client = self._service, self._client
        if service is not None and self._connections is not None:
            admission = service.admission
            self._set(names.OPEN_STREAMS, service.num_open)
            self._set(names.CONNECTIONS, self._connections.num_connections)
            self._set(names.QUEUED, admission.waiting)
            self._set(names.QUEUED_TOKENS, admission.tokens)
            self._set(names.OLDEST, admission.oldest_wait())
            self._climb(self._at[names.SLOW.name], service.num_dropped, self._seen)
        self._set(names.GRAMMARS, num_checked())
        if client is not None:
            self._set(names.UNSENT, client.num_unsent)
            if self._number == 0:
                self._set(names.HEART_AGE, client.heartbeat_age())
                self._set(names.STEP_AGE, client.step_age())
                if client.phase == "down":  # nobody says so any more
                    self._set(names.READY, 0.0)
                    self._note_gauges(Stats())
        for (process, cause), count in self._restarts().items():
            self._cells[self._sheet.row(names.RESTARTS.name, (process, cause))] = count
        self._note_gc()

    def _note_gc(self) -> None:
        for generation, stats in enumerate(gc.get_stats()):
            for family, value in zip(names.GC, (stats["collected"], stats["uncollectable"], stats["collections"]), strict=True):
                self._climb(self._sheet.row(family.name, (str(generation),)), value, self._seen)

    # -- cells ---------------------------------------------------------------------------------------------------------

    def _first_token(self, timing: Timing, now: float) -> None:
        self._observe(names.TTFT, now - timing.arrival)
        cells, cached = self._cells, timing.cached_tokens
        cells[self._at[names.PROMPT.name]] += timing.prompt_tokens
        cells[self._at[names.CACHED.name]] += cached
        cells[self._sheet.row(names.BY_SOURCE.name, ("local_compute",))] += timing.prompt_tokens - cached
        cells[self._sheet.row(names.BY_SOURCE.name, ("local_cache_hit",))] += cached

    def _observe(self, family: Family, value: float) -> None:
        cells, cell, bounds = self._cells, self._at[family.name], family.buckets
        cells[cell + bisect_left(bounds, value)] += 1.0
        cells[cell + len(bounds) + 1] += value

    def _set(self, family: Family, value: float, labels: tuple[str, ...] = ()) -> None:
        self._cells[self._sheet.row(family.name, labels)] = value

    def _follow(self, family: Family, value: float) -> None:
        self._climb(self._at[family.name], value, self._engine_seen)

    def _climb(self, cell: int, value: float, seen: dict[int, float]) -> None:
        """Let a counter grow as another one has grown since it was ``seen``."""
        self._cells[cell] += value - seen.get(cell, 0.0)
        seen[cell] = value
