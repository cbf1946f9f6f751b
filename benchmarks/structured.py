"""Structured outputs: what a grammar costs to compile, what a mask costs per token, and what a batch loses by it.

Three schemas (two fields; ten bounded strings and an array of objects; fifty tools as alternatives) over the model's own
vocabulary, one thread: every mask on the way of a random answer is timed, the first ones included, since each request begins
with a cold automaton. Then the engine decodes a batch free and the same batch under the medium schema, both to the same number
of tokens. Table for people, last line JSON.

    python benchmarks/structured.py --model smollm2 [--rows 16] [--tokens 64] [--answers 20] [any option of the engine]
"""

import argparse
import dataclasses
import random
import time
from typing import Any

import numpy as np

from octavo import LLM, EngineConfig, SamplingParams, StructuredOutputsParams
from octavo.bench.report import document, json_line
from octavo.text.grammar import check
from octavo.text.matcher import compile_grammar
from octavo.text.vocabulary import Tokenizer

SMALL: dict[str, Any] = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"],
    "additionalProperties": False}
ITEM = {"type": "object", "properties": {"id": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["id", "tags"], "additionalProperties": False}
MEDIUM: dict[str, Any] = {
    "type": "object", "properties": {**{f"field_{i}": {"type": "string", "maxLength": 40} for i in range(10)},
                                     "items": {"type": "array", "items": ITEM}},
    "required": [*(f"field_{i}" for i in range(10)), "items"], "additionalProperties": False}
TOOLS: dict[str, Any] = {"anyOf": [
    {"type": "object", "properties": {
        "name": {"const": f"tool_{i}"}, "arguments": {
            "type": "object", "properties": {f"argument_{j}": {"type": "string"} for j in range(5)},
            "required": ["argument_0"], "additionalProperties": False}},
     "required": ["name", "arguments"], "additionalProperties": False} for i in range(50)]}
SCHEMAS = {"small": SMALL, "medium": MEDIUM, "tools_50": TOOLS}

Figures = dict[str, tuple[float, str]]


def masks(tokenizer: Tokenizer, text: str, seed: int, steps: int) -> list[float]:
    """Seconds of every mask on a random way through a grammar."""
    rng, pieces, output, seconds = random.Random(seed), tokenizer.pieces(), list[int](), list[float]()
    matcher = compile_grammar(text, tokenizer, tokenizer.eos_token_ids)
    words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    for _ in range(steps):
        taken = np.array(output, np.int32)
        started = time.perf_counter()
        good = matcher(taken, words)
        seconds.append(time.perf_counter() - started)
        assert good, matcher.error
        choices = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        ends = [token for token in choices if pieces[token][:1] in (b'"', b"}", b"]")]
        output.append(rng.choice(ends if ends and rng.random() < 0.3 else choices))
        if output[-1] in tokenizer.eos_token_ids:
            break
    return seconds


def measure(tokenizer: Tokenizer, name: str, answers: int) -> Figures:
    """Compile time and mask times of one schema."""
    text = check(StructuredOutputsParams(json=SCHEMAS[name]), tokenizer, name).text
    compiled = []
    for _ in range(5):
        started = time.perf_counter()
        compile_grammar(text, tokenizer, tokenizer.eos_token_ids)
        compiled.append(time.perf_counter() - started)
    found = np.array([one for seed in range(answers) for one in masks(tokenizer, text, seed, 100)]) * 1e6
    return {f"{name}/compile_ms": (1e3 * float(np.median(compiled)), "ms"), f"{name}/mask_mean_us": (float(found.mean()), "us"),
            f"{name}/mask_p50_us": (float(np.median(found)), "us"),
            f"{name}/mask_p99_us": (float(np.percentile(found, 99)), "us")}


def decode(llm: LLM, rows: int, tokens: int, schema: dict[str, Any] | None) -> float:
    """Tokens a second of a batch; every row gets ``tokens`` of them (the schema leaves room for more)."""
    wanted = None if schema is None else StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=tokens, ignore_eos=True, detokenize=False,
                             structured_outputs=wanted) for i in range(rows)]
    started = time.perf_counter()
    outputs = llm.generate([f"Number {i}: describe a person." for i in range(rows)], params, use_tqdm=False)
    return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - started)


def main(words: list[str] | None = None) -> None:
    """Measure, print a table and the results object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answers", type=int, default=20)
    EngineConfig.add_cli_args(parser, model="option")
    args = parser.parse_args(words)
    config = EngineConfig.from_cli_args(args)
    llm = LLM(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    tokenizer, figures = llm.get_tokenizer(), Figures()
    started = time.perf_counter()
    compile_grammar('start: "a"', tokenizer, tokenizer.eos_token_ids)
    figures["vocabulary_s"] = (time.perf_counter() - started, "s")
    for name in SCHEMAS:
        figures |= measure(tokenizer, name, args.answers)
    best = {"free": 0.0, "constrained": 0.0}
    for _ in range(4):  # in turns, the first warms up
        best = {"free": max(best["free"], decode(llm, args.rows, args.tokens, None)),
                "constrained": max(best["constrained"], decode(llm, args.rows, args.tokens, MEDIUM))}
    figures |= {f"decode_{args.rows}/{kind}_tok_s": (value, "tok/s") for kind, value in best.items()}
    figures[f"decode_{args.rows}/share"] = (best["constrained"] / best["free"], "of free")
    for name, (value, unit) in figures.items():
        print(f"{name:32} {value:12.4g} {unit}")
    llm.close()
    print(json_line(document(config.model, "structured", figures, ["structured", *(words or [])])))


if __name__ == "__main__":
    main()
