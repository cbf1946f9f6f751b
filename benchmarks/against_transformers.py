"""Octavo and transformers on the same weights, on this machine, in one run: the table of docs/performance.md.

The model is SmolLM2-135M-Instruct from its GGUF file. Our own reader dequantises it to float32 and the tensors go into
a LlamaForCausalLM, so that both compute the same network; Octavo stores weights as ``--dtype`` says (auto: bfloat16).
Every figure is measured alternately, Octavo first, then transformers, and the medians are compared. Prompts are new
random ids every time, so the prefix cache has nothing to give. Peak memory comes from processes of their own, and the
time to the first token of the demo is what ``examples/demo.py`` prints. A table for people, the last line JSON.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from octavo import LLM, EngineConfig, SamplingParams
from octavo.bench.report import json_line, machine, rounded
from octavo.commands.console import number_text, print_table
from octavo.models import registry, weights
from octavo.models.hub import resolve

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = 100  # ids below are special tokens; random prompts leave them out
Complete = Callable[[list[list[int]], int], None]  # prompts, new tokens each


@dataclass(frozen=True)
class Case:
    """One shape: prompts, their length, output tokens."""

    name: str
    requests: int
    prompt: int
    output: int


DECODE = Case("single_32_128", 1, 32, 128)
BATCH = Case("batch16_64_64", 16, 64, 64)
PREFILL = Case("single_512_1", 1, 512, 1)
MEMORY = Case("batch4_1920_128", 4, 1920, 128)


def main() -> int:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto", help="of Octavo's weights and KV cache: auto (bfloat16) or float32")
    parser.add_argument("--batch-invariant", action="store_true", help="run Octavo with --batch-invariant")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default: 5)")
    parser.add_argument("--memory-of", choices=("octavo", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return child(args)
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder))
        figures = memory(args, folder) | demo(args.rounds) | speed(args, folder)
    show(args, figures)
    return 0


def export(folder: Path) -> None:
    """Write the GGUF file's tensors, dequantised to float32 by our reader, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    source = resolve(EngineConfig(model="smollm2"))
    assert source.config["architectures"] == ["LlamaForCausalLM"], source.config
    checkpoint = weights.open_checkpoint(source, registry.spec(source.config), torch.float32, "auto")
    model = LlamaForCausalLM(LlamaConfig(**source.config))
    missing, unexpected = model.load_state_dict({name: read() for name, read in checkpoint.items()}, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(folder)


def octavo(args: argparse.Namespace) -> Complete:
    """Octavo's side: the offline API, ids in and out."""
    llm = LLM("smollm2", dtype=args.dtype, batch_invariant=args.batch_invariant, skip_tokenizer_init=True)

    def complete(prompts: list[list[int]], output: int) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output, detokenize=False)
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert all(len(f.outputs[0].token_ids) == output for f in found)

    return complete


def transformers(folder: str) -> Complete:
    """Transformers' side: generate on a static batch, with its own KV cache."""
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos on the other side

    def complete(prompts: list[list[int]], output: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, do_sample=False,
                                   pad_token_id=0)
        assert found.shape == (len(prompts), len(prompts[0]) + output)

    return complete


def prompts_of(case: Case, generator: np.random.Generator) -> list[list[int]]:
    """New random prompts of a case."""
    return [generator.integers(SPECIAL, 49000, case.prompt).tolist() for _ in range(case.requests)]


def speed(args: argparse.Namespace, folder: str) -> dict[str, tuple[float, float, str]]:
    """Tokens per second: figure -> (octavo, transformers, unit)."""
    sides = (octavo(args), transformers(folder))
    generator = np.random.default_rng(0)

    def seconds(side: Complete, case: Case, output: int) -> float:
        prompts = prompts_of(case, generator)
        start = time.perf_counter()
        side(prompts, output)
        return time.perf_counter() - start

    for side in sides:  # warm up
        seconds(side, PREFILL, 4)
        seconds(side, BATCH, 2)
    rates: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(args.rounds):
        for i, side in enumerate(sides):
            def note(name: str, value: float, i: int = i) -> None:
                rates.setdefault(name, ([], []))[i].append(value)

            first = seconds(side, DECODE, 1)
            note(f"{DECODE.name}/decode_tok_s", (DECODE.output - 1) / (seconds(side, DECODE, DECODE.output) - first))
            note(f"{BATCH.name}/output_tok_s", BATCH.requests * BATCH.output / seconds(side, BATCH, BATCH.output))
            note(f"{PREFILL.name}/prefill_tok_s", PREFILL.prompt / seconds(side, PREFILL, 1))
    return {name: (median(ours), median(theirs), "tok/s") for name, (ours, theirs) in rates.items()}


def memory(args: argparse.Namespace, folder: str) -> dict[str, tuple[float, float, str]]:
    """Peak resident memory of a process that answers four requests of 2,048 tokens at once, in MiB."""
    found = []
    for side in ("octavo", "transformers"):
        words = [sys.executable, __file__, "--memory-of", side, "--folder", folder, "--dtype", args.dtype]
        words += ["--batch-invariant"] if args.batch_invariant else []
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found.append(float(done.stdout.splitlines()[-1]))
    return {f"{MEMORY.name}/peak_rss_mib": (found[0], found[1], "MiB")}


def child(args: argparse.Namespace) -> int:
    """Answer the memory case and print this process's own high-water mark in MiB."""
    side = octavo(args) if args.memory_of == "octavo" else transformers(args.folder)
    side(prompts_of(MEMORY, np.random.default_rng(0)), MEMORY.output)
    # Not getrusage: its maximum survives exec, and would begin at the size of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)
    return 0


def demo(rounds: int) -> dict[str, tuple[float, float | None, str]]:
    """Seconds from the start of the demo to its first token, imports and loading included."""
    found = []
    for _ in range(min(rounds, 3)):
        done = subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py")], check=True, capture_output=True,
                              text=True, cwd=ROOT)
        match = re.search(r"time to first token: ([\d.]+) s", done.stdout)
        assert match is not None, done.stdout
        found.append(float(match[1]))
    return {"demo/start_to_first_token_s": (median(found), None, "s")}


def show(args: argparse.Namespace, figures: dict[str, tuple[float, float | None, str]]) -> None:
    """The table, then one line of JSON."""
    where = machine()
    rows = []
    for name, (ours, theirs, unit) in figures.items():
        other = ("-", "-") if theirs is None else (number_text(theirs), f"{ours / theirs:.2f}")
        rows.append((name, unit, number_text(ours), *other))
    mode = f"weights {args.dtype}" + (", batch invariant" if args.batch_invariant else "")
    threads = f"{torch.get_num_threads()} torch threads, load {os.getloadavg()[0]:.1f} at the end"
    print_table(f"SmolLM2-135M-Instruct (Octavo {mode}; transformers float32), {where['machine']}, {threads}",
                ("figure", "unit", "octavo", "transformers", "ratio"), rows, numeric={2, 3, 4})
    named: dict[str, Any] = {}
    for name, (ours, theirs, unit) in figures.items():
        named[f"smollm2/{name}"] = {"value": rounded(ours), "unit": unit}
        if theirs is not None:
            named[f"smollm2/{name}"] |= {"transformers": rounded(theirs), "ratio": rounded(ours / theirs)}
    date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    words = ["python", "benchmarks/against_transformers.py", *sys.argv[1:]]
    print(json_line({**where, "date": date, "command": " ".join(words), "figures": named}))


if __name__ == "__main__":
    sys.exit(main())
