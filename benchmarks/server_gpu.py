"""The server on one GPU beside the engine that it serves: which share of the offline throughput is left to clients over HTTP.

``octavo serve`` on made-up weights and a made-up vocabulary gets benchmarks/workloads/sharegpt_like.json as streams over TCP, all
at once and then at random times; ``octavo bench throughput`` has the same lengths before, in the same run and never beside.
Processor time is told by process, and for the busiest thread of each, since that is what holds the others up. Every part has
its own process or server; what fails or does not fit the --budget of seconds costs its own figures and no others, and is named
in "notes". A table for people, the last line JSON.

    python benchmarks/server_gpu.py                              # all parts, two minutes on an H100
    python benchmarks/server_gpu.py --parts offline defaults     # the share alone
"""

import argparse
import asyncio
import datetime
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import psutil
import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from octavo.bench.report import json_line, machine, rounded
from octavo.bench.workload import Workload, random_prompts, read_lengths
from octavo.client.connection import Address, Client
from octavo.client.figures import figures as figures_of
from octavo.client.load import Asked, Record, Sender, Traffic, busiest, run_all
from octavo.client.private import end_with_parent
from octavo.client.wire import ConnectionFailed
from octavo.commands.console import number_text, print_table

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = ROOT / "benchmarks" / "workloads" / "sharegpt_like.json"
QUICK = ("offline", "defaults")
PARTS = (*QUICK, "poisson", "rows", "processes")
TARGET = 0.7  # of the offline rate, with the server's defaults
POISSON = 0.6  # of the rate that all requests at once have reached
MANY_ROWS, PROCESSES = 1024, 2
# More requests come at once than a server lets wait by default, and a 503 would be no figure.
QUEUE = ("--max-queued-requests", "8192")
WARM = (32, 64, 16)  # requests, prompt and output tokens before what counts
START_SECONDS, STOP_SECONDS, LEAST_SECONDS = 60.0, 10.0, 8.0
CLIENT_WARM = 0.8  # of a processor: from here on the client may be what is measured
LETTERS, BLANK = (2, 3, 3, 4, 4), "\u0120"  # of a made-up word; how byte-level vocabularies spell the space before one


@dataclass(frozen=True)
class Load:
    """What a run has shown: vLLM's keys of ``octavo bench serve``, and how busy the client was (0 to 1)."""

    figures: dict[str, Any]
    tokens_per_chunk: float
    client: float


class Usage:
    """Processor seconds of the server's processes from now on, and those of the busiest thread of each."""

    def __init__(self, server: int) -> None:
        found = psutil.Process(server)
        of_engine = [p for p in found.children(recursive=True) if "octavo.server.engine_process" in p.cmdline()]
        others = [p for p in found.children(recursive=True) if "octavo.server.main" in p.cmdline()]
        self.api, self.engine = [found, *others], of_engine
        self._before = {p.pid: _threads(p) for p in (*self.api, *self.engine)}
        self._begin = time.perf_counter()

    def seconds(self, processes: Sequence[psutil.Process]) -> list[float]:
        """Of each process, all threads together."""
        return [sum(self._spent(p).values()) for p in processes]

    def busiest(self, processes: Sequence[psutil.Process]) -> float:
        """The largest share of the time since then for which one thread computed."""
        return max(max(self._spent(p).values()) for p in processes) / (time.perf_counter() - self._begin)

    def _spent(self, process: psutil.Process) -> dict[int, float]:
        before = self._before[process.pid]
        return {thread: seconds - before.get(thread, 0.0) for thread, seconds in _threads(process).items()}


def _threads(process: psutil.Process) -> dict[int, float]:
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


class Run:
    """One call of this script: what was asked for, what has come out, and how much time is left."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.name = args.model.name.lower()
        self.config: dict[str, Any] = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
        self.work: Workload = read_lengths(str(LENGTHS), args.requests)
        self.figures: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.offline: float | None = args.offline
        self._end = time.monotonic() + args.budget
        self._seed = random.SystemRandom().randrange(1 << 30)  # the prefix cache has nothing to give

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self._end - time.monotonic())

    def options(self) -> list[str]:
        """Of every engine here."""
        return ["--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "4096", "--device", self.args.device,
                *self.args.engine]

    def put(self, name: str, value: float, unit: str, **beside: float) -> None:
        """A figure has come out."""
        full = f"{self.name}/{self.work.name}/{name}"
        self.figures[full] = {"value": rounded(value), "unit": unit, **beside}
        print(f"{full}: {number_text(value)} {unit}", flush=True)

    def prompts(self, lengths: Sequence[tuple[int, int]]) -> list[Asked]:
        """Requests of these lengths, of ids that no other run has had."""
        self._seed += 1
        ids = random_prompts([prompt for prompt, _ in lengths], int(self.config["vocab_size"]), self._seed)
        return [Asked(prompt, len(prompt), output) for prompt, (_, output) in zip(ids, lengths, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for and print it."""
    args = parse(argv)
    started = time.monotonic()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this ends the server too
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(args, Path(folder))
            measure(run)
    finally:
        signal.signal(signal.SIGTERM, before)
    show(run, time.monotonic() - started)
    return 1 if run.notes and not run.figures else 0


def measure(run: Run) -> None:
    """All parts that were asked for."""
    parts = set(run.args.parts)
    write_tokenizer(run.folder, run.config)
    if "offline" in parts:
        attempt(run, "offline", lambda: measure_offline(run))
    if {"defaults", "poisson"} & parts:
        attempt(run, "defaults", lambda: uvloop.run(measure_server(run, "server", (), "poisson" in parts)))
    if "rows" in parts:
        words = ("--max-num-seqs", str(run.args.rows))
        attempt(run, "rows", lambda: uvloop.run(measure_server(run, f"server_{run.args.rows}_rows", words)))
    if "processes" in parts:
        more = ("--api-server-count", str(PROCESSES))
        attempt(run, "processes", lambda: uvloop.run(measure_server(run, f"server_{PROCESSES}_processes", more)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks" / "models" / "qwen3-0.6b", help="folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS),
                        help=f"rows: with {MANY_ROWS} of them; processes: {PROCESSES} for the API; poisson brings defaults")
    parser.add_argument("--quick", action="store_true", help=f"the parts {' and '.join(QUICK)} only")
    parser.add_argument("--requests", type=int, help="take only so many of the lengths")
    parser.add_argument("--rows", type=int, default=MANY_ROWS, help=f"of the part rows (default: {MANY_ROWS})")
    parser.add_argument("--offline", type=float, metavar="TOK_S", help="the offline rate, where it is not measured here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds for everything (default: 150)")
    parser.add_argument("--engine", nargs=argparse.REMAINDER, default=[], metavar="WORD",
                        help="flags of every engine, as the last of all: --engine --max-num-seqs 64")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    args.model = args.model.resolve()
    if args.quick:
        args.parts = list(QUICK)
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} holds no config.json")
    return args


def attempt(run: Run, part: str, work: Callable[[], None]) -> None:
    """Measure a part, unless its time is over; a failure is a note."""
    if run.left < LEAST_SECONDS:
        run.notes.append(f"{run.name}/{part} was left out: {max(run.left, 0):.0f} s of the budget were left")
        return
    try:
        work()
    except (Exception, BaseExceptionGroup) as error:
        reason = "its time was over" if isinstance(error, TimeoutError) else str(error)
        run.notes.append(f"{run.name}/{part}: {type(error).__name__}: {reason}")


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """A byte-level vocabulary of the model's size: bytes, its control tokens, and made-up words of some four characters."""
    size, chance = int(config["vocab_size"]), random.Random(0)
    listed = [config.get("bos_token_id"), config.get("eos_token_id")]
    control = {int(token): f"<|{token}|>" for token in listed if isinstance(token, int)}
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(words) + len(control):
        raise ValueError(f"a vocabulary of {size} has no room for all bytes")
    known = set(words)
    while len(words) < size - len(control):
        word = chance.choice(("", BLANK)) + "".join(chance.choices(ascii_lowercase, k=chance.choice(LETTERS)))
        if word not in known:
            known.add(word)
            words.append(word)
    left = iter(words)
    vocabulary = {control[token] if token in control else next(left): token for token in range(size)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control.values()])
    assert backend.get_vocab_size() == size
    backend.save(str(folder / "tokenizer.json"))
    eos = control.get(config.get("eos_token_id", -1))
    (folder / "tokenizer_config.json").write_text(json.dumps({} if eos is None else {"eos_token": eos}), encoding="utf-8")


def measure_offline(run: Run) -> None:
    """``octavo bench throughput`` in a process of its own."""
    words = [sys.executable, "-m", "octavo", "bench", "throughput", "--model", str(run.args.model), "--lengths", str(LENGTHS),
             *run.options()]
    words += [] if run.args.requests is None else ["--num-prompts", str(run.args.requests)]
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=run.left, preexec_fn=partial(end_with_parent, os.getpid()))
    if done.returncode:
        raise RuntimeError(f"octavo bench throughput ended with {done.returncode}: {done.stdout[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])["figures"]
    run.offline = next(figure["value"] for name, figure in found.items() if name.endswith("/output_tok_s"))
    run.put("offline/output_tok_s", run.offline, "tok/s")


async def measure_server(run: Run, name: str, words: Sequence[str], poisson: bool = False) -> None:
    """One server: all requests at once, and at random times where that is wanted."""
    async with asyncio.timeout(run.left - STOP_SECONDS / 2), served(run, words) as (client, pid, seconds):
        run.put(f"{name}/start_to_ready_s", seconds, "s")
        count, prompt, output = WARM
        await load(run, client, [(prompt, output)] * min(count, len(run.work.lengths)), Traffic())
        usage = Usage(pid)
        found = await load(run, client, run.work.lengths, Traffic())
        rate = float(found.figures["output_throughput"])
        run.put(f"{name}/output_tok_s", rate, "tok/s")
        if run.offline is not None:
            run.put(f"{name}/of_offline", rate / run.offline, "", **({} if words else {"target": TARGET}))
        report(run, name, found, usage)
        if poisson:
            asked = POISSON * found.figures["request_throughput"]
            if len(run.work.lengths) / asked > run.left - STOP_SECONDS:
                raise RuntimeError(f"poisson was left out: it needs more than the {run.left:.0f} s that are left")
            usage = Usage(pid)
            found = await load(run, client, run.work.lengths, Traffic(rate=asked))
            run.put(f"{name}_poisson/output_tok_s", found.figures["output_throughput"], "tok/s")
            report(run, f"{name}_poisson", found, usage)


def report(run: Run, name: str, found: Load, usage: Usage) -> None:
    """What a load has cost and how its readers fared."""
    tokens = found.figures["total_output_tokens"]
    for metric in ("ttft", "itl"):
        for percentile in (50, 99):
            run.put(f"{name}/{metric}_p{percentile}_ms", found.figures[f"p{percentile}_{metric}_ms"], "ms")
    for kind, processes in (("api", usage.api), ("engine", usage.engine)):
        run.put(f"{name}/{kind}_us_per_token", 1e6 * sum(usage.seconds(processes)) / tokens, "us")
        run.put(f"{name}/{kind}_busiest_thread", usage.busiest(processes), "of a core")
    run.put(f"{name}/tokens_per_chunk", found.tokens_per_chunk, "")
    run.put(f"{name}/client_busy", found.client, "of a core")
    if len(usage.api) > 1:
        parts = ", ".join(f"{seconds:.1f} s" for seconds in usage.seconds(usage.api))
        run.notes.append(f"{run.name}/{name}: the API processes computed for {parts}")
    if found.client > CLIENT_WARM:
        run.notes.append(f"{run.name}/{name}: the client was busy for {found.client:.0%} of a second; figures may be its own")


async def load(run: Run, client: Client, lengths: Sequence[tuple[int, int]], traffic: Traffic) -> Load:
    """Send requests of these lengths and follow their streams; RuntimeError when one of them has no whole answer."""
    name = (await client.request("GET", "/v1/models")).json()["data"][0]["id"]
    sender = Sender(client, name, fields={"ignore_eos": True, "temperature": 0.0})
    asked, stop = run.prompts(lengths), asyncio.Event()
    watch = asyncio.create_task(busiest(stop))
    try:
        records, seconds = await run_all(sender.send, asked, traffic.arrivals(len(asked), seed=0))
    finally:
        stop.set()
        share = await watch
    check(records, asked)
    chunks = sum(1 + len(record.gaps) for record in records)
    found = figures_of(records, seconds, ("ttft", "itl"), (50, 99), {})
    return Load(found, found["total_output_tokens"] / chunks, share)


def check(records: Sequence[Record], asked: Sequence[Asked]) -> None:
    """A figure counts only if every token that was asked for has come."""
    bad = [record for record, one in zip(records, asked, strict=True)
           if record.failure is not None or record.num_output_tokens != one.num_output_tokens]
    if bad:
        why = bad[0].error or f"{bad[0].num_output_tokens} tokens have come"
        raise RuntimeError(f"{len(bad)} of {len(records)} requests have no whole answer: {why}")


@asynccontextmanager
async def served(run: Run, words: Sequence[str]) -> AsyncIterator[tuple[Client, int, float]]:
    """A server on a free port: a client, its process id, and the seconds that it took to be ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "octavo", "serve", str(run.args.model), "--tokenizer", str(run.folder), "--port", str(port),
               *QUEUE, "--shutdown-timeout", "2", *run.options(), *words]
    path = run.folder / "server.log"
    begin = time.perf_counter()
    with path.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                   process_group=0, preexec_fn=partial(end_with_parent, os.getpid()))
    client = Client(Address.parse(f"http://127.0.0.1:{port}"))
    try:
        await ready(client, process)
        yield client, process.pid, time.perf_counter() - begin
    except BaseException:
        print(*path.read_text(encoding="utf-8", errors="replace").splitlines()[-40:], sep="\n", flush=True)
        raise
    finally:
        try:
            await client.close()
        finally:
            end(process)


async def ready(client: Client, process: subprocess.Popen[bytes]) -> None:
    """Wait for the first 200 of /health; RuntimeError when the server ends instead, TimeoutError when it takes too long."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            try:
                if (await client.request("GET", "/health")).status == 200:
                    return
            except ConnectionFailed:
                pass  # nobody listens yet
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode} before it was ready")
            await asyncio.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the server; its other processes end with it."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def show(run: Run, seconds: float) -> None:
    """The table, what was left out, then one line of JSON."""
    where = machine()
    rows = [(name, figure["unit"], number_text(figure["value"]), number_text(figure["target"]) if "target" in figure else "-")
            for name, figure in run.figures.items()]
    title = f"{where['gpu'] or where['machine']}, {seconds:.0f} s"
    print_table(title, ("figure", "unit", "octavo", "target"), rows, numeric={2, 3})
    for text in run.notes:
        print(f"note: {text}")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = " ".join(["python", "benchmarks/server_gpu.py", *run.args.argv])
    print(json_line({**where, "date": date, "command": command, "figures": run.figures, "notes": run.notes}))


if __name__ == "__main__":
    sys.exit(main())
