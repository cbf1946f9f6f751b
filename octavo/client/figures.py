"""Figures of a benchmark against a server: from records to vLLM's JSON keys and its table.

Owns the arithmetic and the names; it does not know connections or how requests arrived. Invariant: latencies are of
whole answers only, and a failed request counts nowhere but among the failed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octavo.client.load import Record
from octavo.errors import ConfigError

METRICS = {"ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)",
           "itl": "Inter-token Latency", "e2el": "End-to-end Latency"}
GOODPUT = ("ttft", "tpot", "e2el")
WIDTH = 50


def parse_metrics(text: str) -> list[str]:
    """Names from ``ttft,tpot``; ConfigError names one that does not exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"percentile_metrics are {', '.join(METRICS)}, got {name!r:.100}.", "percentile_metrics")
    return list(dict.fromkeys(names))


def parse_percentiles(text: str) -> list[float]:
    """Numbers from ``50,99.9``; ConfigError names one that is no percentile."""
    found = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            found.append(-1.0)
        if not 0 <= found[-1] <= 100:
            raise ConfigError(f"metric_percentiles must be from 0 to 100, got {word!r:.100}.", "metric_percentiles")
    return found


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """Metric -> milliseconds from ``ttft:300``; ConfigError names what is not of that form."""
    found = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in GOODPUT or not limit >= 0:
            raise ConfigError(f"goodput must be METRIC:MILLISECONDS with {', '.join(GOODPUT)}, got {word!r:.100}.", "goodput")
        found[name] = limit
    return found


def figures(records: Sequence[Record], duration: float, metrics: Sequence[str], percentiles: Sequence[float],
            goodput: Mapping[str, float]) -> dict[str, Any]:
    """The results of a run.

    Args:
        duration: seconds from the first request to the last end. metrics: whose mean, median, std and percentiles are
            reported, in milliseconds. goodput: limits in milliseconds; a request is good when it keeps all of them.
    """
    whole = [record for record in records if record.failure is None]
    prompt = sum(record.num_prompt_tokens for record in whole)
    output = sum(record.num_output_tokens for record in whole)
    good = sum(all(1000 * _value(record, name) <= limit for name, limit in goodput.items()) for record in whole)
    found: dict[str, Any] = {
        "duration": duration, "completed": len(whole), "failed": len(records) - len(whole),
        "total_input_tokens": prompt, "total_output_tokens": output,
        "request_throughput": len(whole) / duration,
        "request_goodput": good / duration if goodput else None,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": peak_rate(whole), "max_concurrent_requests": peak_concurrency(whole),
    }
    samples: dict[str, list[float]] = {
        "ttft": [record.ttft for record in whole],
        "tpot": [record.tpot for record in whole if record.num_output_tokens > 1],
        "itl": [gap for record in whole for gap in record.gaps],
        "e2el": [record.latency for record in whole],
    }
    for name in metrics:
        values = 1000 * np.array(samples[name] or [0.0])
        found |= {f"mean_{name}_ms": float(values.mean()), f"median_{name}_ms": float(np.median(values)),
                  f"std_{name}_ms": float(values.std())}
        found |= {f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles}
    return found


def details(records: Sequence[Record]) -> dict[str, Any]:
    """What ``--save-detailed`` adds: one entry per request, failed ones too; times in seconds."""
    return {"input_lens": [record.num_prompt_tokens for record in records],
            "output_lens": [record.num_output_tokens for record in records],
            "ttfts": [record.ttft for record in records], "itls": [record.gaps for record in records],
            "generated_texts": [record.text for record in records], "errors": [record.error for record in records]}


def token_times(record: Record) -> list[float]:
    """When each chunk of output came, seconds of the benchmark's clock."""
    if record.first is None:
        return []
    return [float(at) for at in record.first + np.concatenate(([0.0], np.cumsum(record.gaps)))]


def peak_rate(records: Sequence[Record]) -> float:
    """Most output tokens in one second, counted in whole seconds from the first request; a chunk holds an even share."""
    if not records:
        return 0.0
    begin = min(record.start for record in records)
    tokens: defaultdict[int, float] = defaultdict(float)
    for record in records:
        times = token_times(record)
        for at in times:
            tokens[int(at - begin)] += record.num_output_tokens / len(times)
    return max(tokens.values(), default=0.0)


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests under way at once; one that ends when another starts is not counted with it."""
    changes = sorted([(record.end, -1) for record in records] + [(record.start, 1) for record in records])
    most = running = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def table(found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float], request_rate: float,
          max_concurrency: int | None) -> str:
    """The results for people, in the form that users of vLLM know."""
    rows: list[tuple[str, Any]] = [("Successful requests", found["completed"]), ("Failed requests", found["failed"])]
    if max_concurrency is not None:
        rows.append(("Maximum request concurrency", max_concurrency))
    if np.isfinite(request_rate):
        rows.append(("Request rate configured (RPS)", float(request_rate)))
    rows += [("Benchmark duration (s)", found["duration"]), ("Total input tokens", found["total_input_tokens"]),
             ("Total generated tokens", found["total_output_tokens"]),
             ("Request throughput (req/s)", found["request_throughput"])]
    if found["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", found["request_goodput"]))
    rows += [("Output token throughput (tok/s)", found["output_throughput"]),
             ("Peak output token throughput (tok/s)", found["max_output_tokens_per_s"]),
             ("Peak concurrent requests", found["max_concurrent_requests"]),
             ("Total token throughput (tok/s)", found["total_token_throughput"])]
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", *map(_row, rows)]
    for name in metrics:
        words = [("Mean", "mean"), ("Median", "median"), *((f"P{p:g}", f"p{p:g}") for p in percentiles)]
        lines.append(f"{METRICS[name]:-^{WIDTH}}")
        lines += [_row((f"{word} {name.upper()} (ms)", found[f"{key}_{name}_ms"])) for word, key in words]
    return "\n".join([*lines, "=" * WIDTH])


def _row(row: tuple[str, Any]) -> str:
    name, value = row
    return f"{name + ':':<40} {f'{value:.2f}' if isinstance(value, float) else value:<10}".rstrip()


def _value(record: Record, name: str) -> float:
    return {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.latency}[name]
