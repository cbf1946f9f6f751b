"""``octavo bench serve``, once its flags are read: the order of things, and the result file with vLLM's keys.

Owns what happens when; traffic, prompts and arithmetic are in ``octavo.client``. Invariant: whatever can be wrong with
the command line, the data or the server is found by first short requests, before the clock starts.
"""

import argparse
import asyncio
import datetime
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from octavo.bench.workload import read_lengths
from octavo.client import figures, plot, prompts
from octavo.client.chunks import CHAT, COMPLETIONS
from octavo.client.connection import Address, Client, Refusal
from octavo.client.load import Asked, Record, Sender, Traffic, busiest, run_all
from octavo.client.models import pick_model
from octavo.commands.remote import api_key
from octavo.config import EngineConfig
from octavo.errors import ConfigError, OctavoError

HOURS = 6 * 3600.0  # a request may take so many seconds
WARM = 0.8  # of a processor: from here on the client may be what is measured


def run(args: argparse.Namespace, sampling: dict[str, float]) -> int:
    """Measure and print; returns 1 when a request failed. ``sampling``: parameters of every request."""
    metrics, percentiles = figures.parse_metrics(args.percentile_metrics), figures.parse_percentiles(args.metric_percentiles)
    goodput = figures.parse_goodput(args.goodput)
    traffic = Traffic(args.request_rate, args.burstiness, args.max_concurrency, args.ramp_up_strategy,
                      args.ramp_up_start_rps, args.ramp_up_end_rps)
    metadata, headers = pairs("metadata", args.metadata), pairs("header", args.header)
    _check_data(args)
    if args.plot is not None:
        plot.check_path(args.plot)
    address = Address.parse(args.base_url or f"http://{_host(args.host)}:{args.port}", "base_url")
    client = Client(address, headers, api_key(args), HOURS)
    model, (records, duration) = uvloop.run(_measure(args, client, traffic, sampling))
    found = figures.figures(records, duration, metrics, percentiles, goodput)
    results = {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), "endpoint_type": args.backend, "backend": args.backend,
        "model_id": model, "tokenizer_id": args.tokenizer or model, "num_prompts": len(records), **metadata,
        "request_rate": args.request_rate if args.request_rate != float("inf") else "inf", "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **({} if traffic.ramp is None else {"ramp_up_strategy": traffic.ramp, "ramp_up_start_rps": traffic.start,
                                            "ramp_up_end_rps": traffic.end}), **found}
    print(figures.table(found, metrics, percentiles, args.request_rate, args.max_concurrency))
    _say_what_failed(records)
    if args.save_result or args.save_detailed:
        _save(args, results | (figures.details(records) if args.save_detailed else {}))
    if args.plot is not None and found["completed"]:
        plot.draw(args.plot, f"{model}: {len(records)} requests", records)
        print(f"picture: {args.plot}", file=sys.stderr)
    print(json.dumps(results, ensure_ascii=False))
    return int(found["failed"] > 0)


async def _measure(args: argparse.Namespace, client: Client, traffic: Traffic, sampling: dict[str, float]
                   ) -> tuple[str, tuple[list[Record], float]]:
    """The model's name; the records of the run and its seconds."""
    try:
        chat = args.backend == "openai-chat"
        named = args.served_model_name or args.model
        model = named if named is not None else (await pick_model(client, None))[0]
        path = args.endpoint or (CHAT if chat else COMPLETIONS)
        ignore_eos = args.lengths is not None if args.ignore_eos is None else args.ignore_eos
        fields = sampling | ({"ignore_eos": True} if ignore_eos else {}) | args.extra_body
        sender = Sender(client, model, path, chat, fields)
        maker = await first_contact(sender)
        asked = await _requests(args, client, model, maker)
        arrivals = traffic.arrivals(len(asked), args.seed)
        warm = [(request.num_prompt_tokens, request.num_output_tokens) for request in asked[:args.num_warmups]]
        warmups = prompts.random_prompts(maker, warm, args.seed + 1)
        await run_all(sender.send, warmups, [0.0] * len(warmups), traffic.max_concurrency)
        bar = None if args.disable_tqdm or not sys.stderr.isatty() else _bar(len(asked))
        stop = asyncio.Event()
        load = asyncio.create_task(busiest(stop))
        measured = await run_all(sender.send, asked, arrivals, traffic.max_concurrency,
                             done=lambda record: None if bar is None else bar.update(1))
        stop.set()
        share = await load
        if bar is not None:
            bar.close()
        if share > WARM:
            print(f"warning: this client was busy for {share:.0%} of a second of the run: latencies may be its own. Use a "
                  "faster or less busy machine, or several clients with a part of the load each.", file=sys.stderr)
        return model, measured
    finally:
        await client.close()


async def first_contact(sender: Sender) -> prompts.Maker:
    """Send short requests, which show that the server answers and how random prompts can be given to it.

    Raises:
        OctavoError: the server cannot be reached or refuses.
    """
    if not sender.chat:
        try:
            await _probe(sender, Asked(prompts.random_prompts(prompts.Ids(), [(8, 1)], 0)[0].prompt, 8, 1))
            return prompts.Ids()
        except Refusal as error:
            if error.status != 400:
                raise
            print(f"note: prompts are words, for token ids were refused ({error})", file=sys.stderr)
    counts = []
    for words in (16, 144):
        record = await _probe(sender, prompts.random_prompts(prompts.Texts(), [(words, 1)], words)[0])
        if not record.counted:
            print("note: the server reports no usage; tokens are taken as words and chunks", file=sys.stderr)
            return prompts.Texts()
        counts.append((words, record.num_prompt_tokens))
    return prompts.Texts.measured(*counts)


async def _probe(sender: Sender, asked: Asked) -> Record:
    record = await sender.send(asked)
    if record.failure is not None:
        raise record.failure
    return record


async def _requests(args: argparse.Namespace, client: Client, model: str, maker: prompts.Maker) -> list[Asked]:
    """The requests that the flags ask for."""
    if args.lengths is not None:
        return prompts.random_prompts(maker, read_lengths(args.lengths, args.num_prompts).lengths, args.seed)
    count = 1000 if args.num_prompts is None else args.num_prompts
    if args.dataset_name == "random":
        lengths = prompts.spread(count, args.random_input_len, args.random_output_len, args.random_range_ratio, args.seed)
        return prompts.random_prompts(maker, lengths, args.seed, args.random_prefix_len)
    if args.dataset_name == "prefix_repetition":
        return prompts.repeated_prefixes(
            maker, count, args.prefix_repetition_num_prefixes, args.prefix_repetition_prefix_len,
            args.prefix_repetition_suffix_len, args.prefix_repetition_output_len, args.seed)
    counter = _own_counter(args.tokenizer) if args.tokenizer is not None else _server_counter(client, model)
    if args.dataset_name == "custom":
        found = await prompts.custom(args.dataset_path, args.custom_output_len, args.num_prompts, counter)
    else:
        found = await prompts.sharegpt(args.dataset_path, args.sharegpt_output_len, args.num_prompts, args.seed, counter)
    return found[:count]


def _own_counter(name: str) -> prompts.Count:
    from octavo.models.source import ModelSource  # what reads models is loaded only for a tokenizer's sake
    from octavo.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelSource("folder", Path(name), {}, {}, name), EngineConfig(model=name, tokenizer=name))

    async def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer.encode_batch(list(texts))]

    return count


def _server_counter(client: Client, model: str) -> prompts.Count:
    async def one(text: str) -> int:
        body = json.dumps({"model": model, "prompt": text}).encode()
        answer = await client.request("POST", "/tokenize", body)
        if answer.status == 404:
            raise OctavoError("the server has no /tokenize to count tokens with: give --tokenizer.")
        found = answer.json()
        if not isinstance(found, dict) or type(found.get("count")) is not int:
            raise OctavoError("the server's /tokenize gives no count: give --tokenizer.")
        return int(found["count"])

    async def count(texts: Sequence[str]) -> list[int]:
        found: list[int] = []
        for at in range(0, len(texts), 16):
            found += await asyncio.gather(*map(one, texts[at:at + 16]))
        return found

    return count


def _check_data(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, and numbers and files that are wrong, before a server is asked anything."""
    from_file = args.dataset_name in ("sharegpt", "custom")
    if from_file and args.dataset_path is None:
        raise ConfigError(f"dataset_path is missing: dataset {args.dataset_name} is read from a file.", "dataset_path")
    if args.dataset_path is not None and not from_file:
        raise ConfigError(f"dataset_path is for sharegpt and custom, got {args.dataset_path!r} with {args.dataset_name}.",
                          "dataset_path")
    if args.lengths is not None:
        if args.dataset_name != "random":
            raise ConfigError(f"lengths cannot be combined with dataset {args.dataset_name}.", "lengths")
        read_lengths(args.lengths, args.num_prompts)
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ConfigError(f"num_prompts must be at least 1, got {args.num_prompts}.", "num_prompts")
    if args.num_warmups < 0:
        raise ConfigError(f"num_warmups must be 0 or more, got {args.num_warmups}.", "num_warmups")
    if args.random_prefix_len < 0:
        raise ConfigError(f"random_prefix_len must be 0 or more, got {args.random_prefix_len}.", "random_prefix_len")
    prompts.spread(1, args.random_input_len, args.random_output_len, args.random_range_ratio, args.seed)
    if args.endpoint is not None and not re.fullmatch(r"/[!-~]*", args.endpoint):
        raise ConfigError(f"endpoint must be a path such as {COMPLETIONS}, got {args.endpoint!r:.100}.", "endpoint")


def pairs(name: str, words: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` words as a dict; ConfigError names the option and a word of another form."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ConfigError(f"{name} must be KEY=VALUE, got {word!r:.100}.", name)
        found[key] = value
    return found


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _say_what_failed(records: Sequence[Record]) -> None:
    reasons: dict[str, int] = {}
    for record in records:
        if record.error:
            reasons[record.error] = reasons.get(record.error, 0) + 1
    for reason, times in sorted(reasons.items(), key=lambda item: -item[1])[:5]:
        print(f"failed, {times} x: {reason}", file=sys.stderr)
    if any(record.failure is None and not record.counted for record in records):
        print("note: the server reports no usage; output tokens are chunks", file=sys.stderr)


def _save(args: argparse.Namespace, results: dict[str, Any]) -> None:
    limit = "" if args.max_concurrency is None else f"-concurrency{args.max_concurrency}"
    name = args.result_filename or \
        f"{args.backend}-{args.request_rate}qps{limit}-{Path(results['model_id']).name}-{results['date']}.json"
    path = Path(args.result_dir or ".") / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"result_filename {str(path)!r} cannot be written: {error}.", "result_filename") from None
    print(f"results: {path}", file=sys.stderr)


def _bar(total: int) -> Any:
    from tqdm import tqdm  # 30 ms, and only a terminal wants it

    return tqdm(total=total, desc="Requests", unit="req", dynamic_ncols=True, file=sys.stderr)
