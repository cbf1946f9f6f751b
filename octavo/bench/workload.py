"""Workloads of the benchmarks: lengths of prompts and outputs, and random token ids of those lengths.

Owns what is asked of an engine, and the check that it did it; it does not know clocks. Invariant: the same seed gives
the same ids, and a run that computed fewer tokens than asked is an error, not a figure.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from octavo.errors import ConfigError, OctavoError
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams


class Offline(Protocol):
    """What a benchmark needs of LLM."""

    def generate(self, prompts: Any, sampling_params: Any = None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Complete prompts."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths of the requests of a run.

    Attributes:
        name: goes into the names of the figures. lengths: (prompt tokens, output tokens) per request.
    """

    name: str
    lengths: tuple[tuple[int, int], ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(prompt for prompt, _ in self.lengths)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(output for _, output in self.lengths)


def uniform(num_prompts: int, input_len: int, output_len: int) -> Workload:
    """``num_prompts`` requests of one shape; ConfigError when a number is below 1."""
    for name, value in (("num_prompts", num_prompts), ("input_len", input_len), ("output_len", output_len)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.", name)
    kind = "single" if num_prompts == 1 else f"batch{num_prompts}"
    return Workload(f"{kind}_{input_len}_{output_len}", ((input_len, output_len),) * num_prompts)


def read_lengths(path: str, num_prompts: int | None = None) -> Workload:
    """The workload of a lengths file: a JSON list of [prompt tokens, output tokens].

    Args:
        num_prompts: take the first so many; None takes all, more than the file holds is a ConfigError.

    Raises:
        ConfigError: the file cannot be read, or holds something else; the message names the entry.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"lengths {path!r} cannot be read: {error}.", "lengths") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"lengths {path!r} must hold a list of [prompt tokens, output tokens].", "lengths")
    for i, entry in enumerate(entries):
        good = isinstance(entry, list) and len(entry) == 2 and all(type(n) is int and n >= 1 for n in entry)
        if not good:
            shown = f"{entry!r:.100}"
            raise ConfigError(f"lengths {path!r} entry {i} must be two positive integers, got {shown}.", "lengths")
    if num_prompts is not None and not 1 <= num_prompts <= len(entries):
        count = len(entries)
        raise ConfigError(f"num_prompts must be from 1 to {count} with {path!r}, got {num_prompts}.", "num_prompts")
    return Workload(Path(path).stem, tuple((entry[0], entry[1]) for entry in entries[:num_prompts]))


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids in [0, vocab_size), one list per length; no two prompts share a prefix but by chance."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def run(
    llm: Offline, prompts: Sequence[list[int]], output_lens: Sequence[int], temperature: float, use_tqdm: bool
) -> None:
    """Compute exactly ``output_lens`` tokens per prompt, as ids; OctavoError when a request ended otherwise."""
    base = SamplingParams(temperature=temperature, ignore_eos=True, detokenize=False)
    params = [base.clone(max_tokens=n) for n in output_lens]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=use_tqdm)
    for output, wanted in zip(outputs, output_lens, strict=True):
        found = sum(len(completion.token_ids) for completion in output.outputs)
        if output.error is not None or found != wanted:
            why = output.error or "no error"
            raise OctavoError(f"request {output.request_id} gave {found} of {wanted} tokens ({why}).")
