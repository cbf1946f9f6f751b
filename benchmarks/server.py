"""The server beside the engine that it serves: what HTTP, text and the process border cost, on this machine, in one run.

Figures: seconds from ``octavo serve`` to the first 200 of /health; output tokens a second of 16 concurrent streams as a share
of the offline engine's with 16 rows; the 99th percentile of /health under that load; processor time of the API process per
token with 256 concurrent streams of a tiny model of 10 layers. Servers are reached over their unix sockets by the client of
``octavo bench serve``. A table for people, the last line JSON.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from octavo.bench.report import json_line, machine, rounded
from octavo.client.connection import Address, Client
from octavo.client.load import Asked, Record, Sender, run_all
from octavo.client.private import PrivateServer
from octavo.client.wire import ConnectionFailed
from octavo.commands.console import number_text, print_table

SPECIAL = 100  # ids below are special tokens; random prompts leave them out
VOCAB = 49152
STREAMS, PROMPT, OUTPUT, ROUNDS = 16, 64, 128, 3
MANY, MANY_OUTPUT = 256, 200
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "eos_token_id": 2, "bos_token_id": 1,
}
# A process of its own, as the server's engine is one, so that both have the same threads.
OFFLINE = """
import json, sys, time
from octavo import LLM, SamplingParams
llm = LLM("smollm2", max_num_seqs=int(sys.argv[1]), disable_log_stats=True)
prompts = json.loads(sys.stdin.read())
params = SamplingParams(max_tokens=int(sys.argv[2]), ignore_eos=True, temperature=0.0)
def run(part):
    begin = time.perf_counter()
    outputs = llm.generate(prompt_token_ids=part, sampling_params=params, use_tqdm=False)
    return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - begin)
run(prompts[:2])
size = int(sys.argv[1])
print(json.dumps([run(prompts[i:i + size]) for i in range(0, len(prompts), size)]))
"""


def main() -> int:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="starts, and batches of 16 streams")
    args = parser.parse_args()
    figures = asyncio.run(measure(args.rounds))
    print_table("server", ("figure", "value", "unit"),
                [(name, number_text(value), unit) for name, (value, unit) in figures.items()], numeric={1})
    print(json_line({"machine": machine(), **{name: rounded(value) for name, (value, _) in figures.items()}}))
    return 0


async def measure(rounds: int) -> dict[str, tuple[float, str]]:
    """All figures: name -> (value, unit)."""
    starts = []
    for _ in range(rounds):
        async with served(["smollm2"]) as (_, _, seconds):
            starts.append(seconds)
    prompts = random_prompts(STREAMS * rounds)
    # In turns, so that a slower minute of the machine hits both.
    offline, online, probes = [], [], list[float]()
    for i in range(rounds):
        part = prompts[STREAMS * i : STREAMS * (i + 1)]
        offline.append(offline_rate(part))
        async with served(["smollm2", "--max-num-seqs", str(STREAMS)]) as (client, _, _):
            await streams(client, random_prompts(2), 8)
            probing = asyncio.create_task(probe(client.address, probes))
            records, seconds = await streams(client, part, OUTPUT)
            probing.cancel()
            online.append(sum(record.num_output_tokens for record in records) / seconds)
    share = median(a / b for a, b in zip(online, offline, strict=True))
    cost, rate = await many_streams()
    return {
        "start_to_ready_s": (median(starts), "s"),
        "offline_16_tok_s": (median(offline), "tok/s"),
        "server_16_streams_tok_s": (median(online), "tok/s"),
        "server_of_offline": (share, ""),
        "health_p99_ms": (float(np.percentile(probes, 99)) * 1e3, "ms"),
        "api_us_per_token_256_streams": (cost * 1e6, "us"),
        "server_256_streams_tok_s": (rate, "tok/s"),
    }


async def many_streams() -> tuple[float, float]:
    """Processor seconds of the API process per token, and tokens a second, with many streams of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TINY))
        words = [folder, "--load-format", "dummy", "--tokenizer", "smollm2", "--max-num-seqs", str(MANY)]
        async with served(words) as (client, server, _):
            process = psutil.Process(server.pid)
            await streams(client, random_prompts(4), 8)
            before = process.cpu_times()
            records, seconds = await streams(client, random_prompts(MANY, 16), MANY_OUTPUT)
            after = process.cpu_times()
    tokens = sum(record.num_output_tokens for record in records)
    return (after.user + after.system - before.user - before.system) / tokens, tokens / seconds


def offline_rate(prompts: list[list[int]]) -> float:
    """Tokens a second of LLM.generate over one batch."""
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(STREAMS), str(OUTPUT)], input=json.dumps(prompts), text=True,
                          stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])[0])


@asynccontextmanager
async def served(words: list[str]) -> AsyncIterator[tuple[Client, PrivateServer, float]]:
    """A server, and the seconds that it took to be ready."""
    begin = time.perf_counter()
    with PrivateServer([*words, "--disable-log-stats", "--disable-uvicorn-access-log"]) as server:
        client = Client(server.address)
        await server.ready(client)
        yield client, server, time.perf_counter() - begin
        await client.close()


async def streams(client: Client, prompts: list[list[int]], output: int) -> tuple[list[Record], float]:
    """Stream the answers to all prompts at once."""
    models = (await client.request("GET", "/v1/models")).json()
    sender = Sender(client, models["data"][0]["id"], fields={"ignore_eos": True, "temperature": 0.0})
    asked = [Asked(prompt, len(prompt), output) for prompt in prompts]
    records, seconds = await run_all(sender.send, asked, [0.0] * len(asked))
    failed = [str(record.failure) for record in records if record.failure is not None]
    assert not failed and all(record.num_output_tokens == output for record in records), failed[:3]
    return records, seconds


async def probe(address: Address, found: list[float]) -> None:
    """Ask /health every 20 ms over a connection of its own."""
    client = Client(address)
    while True:
        begin = time.perf_counter()
        try:
            assert (await client.request("GET", "/health")).status == 200
        except ConnectionFailed:
            found.append(60.0)
        else:
            found.append(time.perf_counter() - begin)
        await asyncio.sleep(0.02)


def random_prompts(count: int, length: int = PROMPT) -> list[list[int]]:
    """Random ids, new ones every time: the prefix cache has nothing to give."""
    generator = np.random.default_rng()
    return [row.tolist() for row in generator.integers(SPECIAL, VOCAB, (count, length))]


if __name__ == "__main__":
    sys.exit(main())
