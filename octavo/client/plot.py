"""A picture of a benchmark: how latencies are spread, and what the server did over time.

Owns the drawing; it does not know what was asked. Invariant: matplotlib is loaded only when a picture is wanted, and its
absence is found before anything is measured.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo.client.figures import token_times
from octavo.client.load import Record
from octavo.errors import ConfigError


def figure_class() -> Any:
    """matplotlib's Figure; ConfigError says how to install it."""
    try:
        return importlib.import_module("matplotlib.figure").Figure  # an optional extra, and half a second to load
    except ImportError:
        raise ConfigError("plot needs matplotlib: pip install 'octavo[plot]'", "plot") from None


def check_path(path: str) -> None:
    """ConfigError unless the file can be a picture, and matplotlib is there to draw it."""
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        raise ConfigError(f"plot must name a .png, .svg or .pdf file, got {path!r}.", "plot")
    figure_class()


def draw(path: str, title: str, records: Sequence[Record]) -> None:
    """Write the picture of a run; ConfigError when no request was answered or the file cannot be written."""
    whole = [record for record in records if record.failure is None]
    if not whole:
        raise ConfigError("plot has nothing to show: no request was answered.", "plot")
    figure = figure_class()(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    begin = min(record.start for record in whole)
    latencies = {"time to first token": [record.ttft for record in whole],
                 "inter-token latency": [gap for record in whole for gap in record.gaps],
                 "end to end": [record.latency for record in whole]}
    for name, values in latencies.items():
        if values:
            axes[0, 0].plot(np.sort(values) * 1000, np.arange(1, len(values) + 1) / len(values) * 100, label=name)
    axes[0, 0].set(xscale="symlog", xlabel="ms", ylabel="% at most", title="latencies")
    axes[0, 0].legend()
    axes[0, 1].scatter([record.start - begin for record in whole], [1000 * record.ttft for record in whole], s=6)
    axes[0, 1].set(xlabel="s, when the request was sent", ylabel="ms", title="time to first token", ylim=0)
    seconds = int(max(record.end for record in whole) - begin) + 1
    shares = [(at - begin, record.num_output_tokens / (1 + len(record.gaps))) for record in whole for at in token_times(record)]
    tokens, edges = np.histogram([at for at, _ in shares], seconds, (0, seconds), weights=[share for _, share in shares])
    axes[1, 0].stairs(tokens, edges, fill=True)
    axes[1, 0].set(xlabel="s", ylabel="tokens/s", title="output tokens", ylim=0)
    changes = sorted([(record.start - begin, 1) for record in whole] + [(record.end - begin, -1) for record in whole])
    axes[1, 1].step([at for at, _ in changes], np.cumsum([change for _, change in changes]), where="post")
    axes[1, 1].set(xlabel="s", ylabel="requests", title="requests under way", ylim=0)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"plot {path!r} cannot be written: {error}.", "plot") from None
