"""``octavo bench serve``: the flags, with vLLM's names; measuring is in ``octavo.commands.bench_run``.

Owns the command line only. Invariant: nothing is loaded for it, so ``--help`` is quick; whatever vLLM has beside these
flags is refused by name, as every unknown flag is.
"""

import argparse
from typing import Any

from octavo.commands.remote import add_key_arg
from octavo.config import human_int, json_object

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
METRICS = ("ttft", "tpot", "itl", "e2el")
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "frequency_penalty": float,
            "presence_penalty": float, "repetition_penalty": float}
DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")


def add_kind(kinds: Any) -> argparse.ArgumentParser:
    """Add ``serve`` to the kinds of ``octavo bench``."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "serve", help="a running server, over HTTP", description="Measure a running server over HTTP. Prompts are random "
        "token ids (completions) or random words (chats), or those of a data set. The last line of the output is JSON.")
    server = parser.add_argument_group("server")
    server.add_argument("--backend", choices=("openai", "openai-chat", "vllm"), default="openai",
                        help="openai and vllm: completions; openai-chat: chats (default: openai)")
    server.add_argument("--base-url", metavar="URL", help="http://HOST:PORT, instead of --host and --port")
    server.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    server.add_argument("--endpoint", metavar="PATH", help=f"route (default: {COMPLETIONS}, or {CHAT} for openai-chat)")
    server.add_argument("--model", help="name sent to the server (default: the first that it lists)")
    server.add_argument("--served-model-name", help="name sent to the server, where --model names a tokenizer's folder")
    server.add_argument("--tokenizer", help="folder, GGUF file or name; counts the tokens of a data set's texts "
                                            "(default: the server's /tokenize does)")
    server.add_argument("--header", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="sent with requests")
    add_key_arg(server)
    server.add_argument("--extra-body", type=json_object, default={}, metavar="JSON", help="more fields of every request")
    data = parser.add_argument_group("requests")
    data.add_argument("--dataset-name", choices=DATASETS, default="random", help="(default: random)")
    data.add_argument("--dataset-path", metavar="FILE", help="of sharegpt (JSON) or custom (JSON lines)")
    data.add_argument("--lengths", metavar="FILE", help="random prompts by a JSON list of [prompt tokens, output tokens], "
                                                        "as octavo bench throughput takes it; implies --ignore-eos")
    data.add_argument("--num-prompts", type=human_int, help="requests (default: 1000, or all of a file if it has fewer)")
    for name, default, words in (
            ("random-input-len", 1024, "prompt tokens"), ("random-output-len", 128, "output tokens"),
            ("random-prefix-len", 0, "tokens that all prompts begin with, besides their own"),
            ("prefix-repetition-prefix-len", 256, "tokens of a shared beginning"),
            ("prefix-repetition-suffix-len", 256, "tokens of its own"),
            ("prefix-repetition-num-prefixes", 10, "shared beginnings"),
            ("prefix-repetition-output-len", 128, "output tokens"),
            ("custom-output-len", 256, "output tokens of a line that names none")):
        data.add_argument("--" + name, type=human_int, default=default, metavar="INT", help=f"{words} (default: {default})")
    data.add_argument("--sharegpt-output-len", type=human_int, metavar="INT",
                      help="output tokens (default: as many as the recorded answer has)")
    data.add_argument("--random-range-ratio", type=float, default=0.0, metavar="R",
                      help="lengths are uniform from (1 - R) to (1 + R) times theirs (default: 0)")
    data.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: 0)")
    data.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, help="answers run to their full length")
    for name, kind in SAMPLING.items():
        greedy = name == "temperature"
        data.add_argument("--" + name.replace("_", "-"), type=kind, default=0.0 if greedy else None, metavar="NUMBER",
                          help="of every request" + (" (default: 0, greedy)" if greedy else ""))
    load = parser.add_argument_group("traffic")
    load.add_argument("--request-rate", type=float, default=float("inf"), metavar="RPS",
                      help="requests per second (default: inf, all at once)")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="X",
                      help="1: Poisson; less: bursts; more: steadier; inf: even (default: 1)")
    load.add_argument("--max-concurrency", type=human_int, metavar="INT", help="most requests under way")
    load.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="change the rate over the run")
    load.add_argument("--ramp-up-start-rps", type=float, metavar="RPS", help="rate of the first request")
    load.add_argument("--ramp-up-end-rps", type=float, metavar="RPS", help="rate of the last")
    load.add_argument("--num-warmups", type=human_int, default=0, metavar="INT", help="requests before those that count")
    out = parser.add_argument_group("results")
    out.add_argument("--percentile-metrics", default="ttft,tpot,itl", metavar="LIST",
                     help=f"of {', '.join(METRICS)} (default: ttft,tpot,itl)")
    out.add_argument("--metric-percentiles", default="99", metavar="LIST", help="such as 50,90,99 (default: 99)")
    out.add_argument("--goodput", nargs="+", action="extend", default=[], metavar="METRIC:MS",
                     help="count requests that keep all these limits, such as ttft:300 tpot:50")
    out.add_argument("--save-result", action="store_true", help="write the results to a file of JSON")
    out.add_argument("--save-detailed", action="store_true", help="with lengths, times, texts and errors of every request")
    out.add_argument("--result-dir", metavar="DIR", help="where (default: here)")
    out.add_argument("--result-filename", metavar="FILE", help="(default: from the settings and the time)")
    out.add_argument("--metadata", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="more keys of the file")
    out.add_argument("--plot", metavar="FILE", help="draw latencies and throughput as .png, .svg or .pdf (octavo[plot])")
    out.add_argument("--disable-tqdm", action="store_true", help="show no progress")
    parser.set_defaults(run=run_serve)
    return parser


def run_serve(args: argparse.Namespace) -> int:
    """Measure and print; returns 1 when a request failed."""
    from octavo.commands.bench_run import run  # numpy and more, which --help and other commands do not need

    given = {name: getattr(args, name) for name in SAMPLING}
    return run(args, {name: value for name, value in given.items() if value is not None})
