"""Scrape: the sheets of all API processes as Prometheus' metric families.

Owns how the numbers of several processes become one and under which names they are shown; it does not know when they grow.
Counters and histograms of all processes are added, those of dead ones too, so that no total goes back; what an API process has
open counts only while it lives. Invariant: a scrape never waits for another process.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from octavo.config import EngineConfig
from octavo.plan import GroupInfo
from octavo.server import metric_names as names
from octavo.server.config import ServerConfig
from octavo.server.metric_names import FAMILIES, Family
from octavo.server.metric_sheet import Key, Sheet, add, read_folder
from octavo.server.remote import EngineClient

ALIVE, PID = "alive", "pid"
"""Rows beside the metrics: when the process was seen last, in monotonic seconds, and its number."""

FRESH = 3.0
"""Seconds after which a process that has not written down what it has open counts as dead."""

KV_OPTIONS = ("block_size", "gpu_memory_utilization", "swap_space", "enable_prefix_caching", "kv_cache_dtype",
              "kv_cache_memory_bytes", "num_gpu_blocks_override", "preemption_mode")

Rows = dict[Key, list[float]]


class Scrape(Collector):
    """Reads all sheets anew for every scrape.

    Args:
        engine, server: options. sheet: of this process. folder: where those of all processes lie, None where this is the only.

    Attributes:
        info: what the engine measured at its start. client: the link to it, for its process id.
    """

    def __init__(self, engine: EngineConfig, server: ServerConfig, sheet: Sheet, folder: Path | None) -> None:
        self._engine, self._sheet, self._folder, self._count = engine, sheet, folder, server.api_server_count
        self._model = (server.served_model_name or (str(engine.model),))[0]
        self._prefixes = ("octavo:", "vllm:") if server.metrics_compat == "vllm" else ("octavo:",)
        self.info: GroupInfo | None = None
        self.client: EngineClient | None = None

    def collect(self) -> Iterator[Metric]:
        """All families, in their order."""
        sheets = self._sheets()
        rows = self._unite(sheets)
        by_name: dict[str, list[tuple[tuple[str, ...], list[float]]]] = defaultdict(list)
        for (name, labels), values in sorted(rows.items()):
            by_name[name].append((labels, values))
        self._add_processes(by_name, sheets)
        for family in FAMILIES:
            if family is names.CACHE_CONFIG:
                yield from self._cache_config()
            else:
                for name in self._names(family):
                    yield self._metric(family, name, by_name[family.name])

    def total(self, family: Family) -> float:
        """One number of all processes."""
        return self._unite(self._sheets()).get((family.name, ()), [0.0])[0]

    def first_pid(self) -> int:
        """Process id of the first API process, whose ``process_*`` are shown."""
        return self._pids(self._sheets()).get(0, 0)

    def _sheets(self) -> dict[int, Rows]:
        return {0: self._sheet.read()} if self._folder is None else read_folder(self._folder, self._count)

    def _unite(self, sheets: dict[int, Rows]) -> Rows:
        now, unite = time.monotonic(), {family.name: family.unite for family in FAMILIES}
        united: Rows = {}
        for rows in sheets.values():
            alive = now - rows.get((ALIVE, ()), [0.0])[0] < FRESH
            for key, values in rows.items():
                how = unite.get(key[0], "")
                if how and not alive:
                    values = [0.0]
                if how == "max":
                    united[key] = [max(values[0], united.get(key, [0.0])[0])]
                else:
                    add(united, key, values)
        return united

    def _pids(self, sheets: dict[int, Rows]) -> dict[int, int]:
        return {number: int(rows[PID, ()][0]) for number, rows in sheets.items() if (PID, ()) in rows}

    def _names(self, family: Family) -> list[str]:
        if not family.prefixed:
            return [family.name]
        prefixes = self._prefixes if family.vllm else self._prefixes[:1]
        return [prefix + name for prefix in prefixes for name in (family.name, *family.aliases)]

    def _metric(self, family: Family, name: str, rows: list[tuple[tuple[str, ...], list[float]]]) -> Metric:
        base = [{"model_name": self._model, "engine": "0"}[label] for label in family.base]
        labels = (*family.base, *family.labels)
        metric: Metric
        if family.kind == "histogram":
            bounds = family.buckets
            # Before the engine is there, nobody knows how long its requests may be, and there are none.
            longest = self.info.max_model_len if self.info is not None else 0.0
            metric = HistogramMetricFamily(name, family.help, labels=labels)
            for extra, values in rows:
                total, buckets = 0.0, []
                for bound, count in zip(bounds, values, strict=False):
                    total += count
                    if bounds is not names.TOKENS or bound <= longest:
                        buckets.append((floatToGoString(bound), total))  # type: ignore[no-untyped-call]
                buckets.append(("+Inf", total + values[len(bounds)]))
                metric.add_metric([*base, *extra], buckets, values[-1])
        elif family.kind == "summary":
            metric = SummaryMetricFamily(name, family.help, labels=labels)
            for extra, values in rows:
                metric.add_metric([*base, *extra], int(values[0]), values[1])
        else:
            metric = (CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily)(name, family.help, labels=labels)
            for extra, values in rows:
                metric.add_metric([*base, *extra], values[0])
        return metric

    def _cache_config(self) -> Iterator[Metric]:
        if (info := self.info) is None:
            return
        values = {name: str(getattr(self._engine, name)) for name in KV_OPTIONS}
        values |= {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_blocks),
                   "num_cpu_blocks": str(info.num_host_blocks), "cache_dtype": self._engine.kv_cache_dtype, "engine": "0"}
        for name in self._names(names.CACHE_CONFIG):
            metric = GaugeMetricFamily(name, names.CACHE_CONFIG.help, labels=tuple(values))
            metric.add_metric(list(values.values()), 1.0)
            yield metric

    def _add_processes(self, rows: dict[str, list[tuple[tuple[str, ...], list[float]]]], sheets: dict[int, Rows]) -> None:
        """What the kernel says about each process of the server."""
        pids = {f"api_{number}": pid for number, pid in self._pids(sheets).items()}
        if self.client is not None and (beat := self.client.last) is not None:
            pids["engine"] = beat.pid
        for name, pid in pids.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                rows[names.PROCESS.name].append(((name,), [pid]))
                rows[names.FDS.name].append(((name,), [process.num_fds()]))
                rows[names.THREADS.name].append(((name,), [process.num_threads()]))
                rows[names.RSS.name].append(((name,), [process.memory_info().rss]))
