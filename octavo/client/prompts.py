"""Prompts of a benchmark against a server: random ones of true lengths, and those of data sets.

Owns lengths, texts and files; it does not know how requests arrive or what comes back. Random prompts are token ids
where the route takes them, else common words whose length in tokens was measured on the server itself, so no tokenizer
is needed. Invariant: the same seed gives the same prompts.
"""

import json
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from octavo.client.load import Asked
from octavo.errors import ConfigError

FIRST_ID, LAST_ID = 1000, 9999  # below are control tokens and single bytes; vocabularies of real models are larger
SHORT_WORDS = """ice oak tea red map sun fog hat cup pen road lamp door wind milk salt rain bird fish moon star lake tree gold
desk coat bread stone river cloud table chair glass paper green north light night music horse apple ocean winter
summer garden window market bridge silver yellow orange forest island engine number letter paint chalk clock
wheel plant sugar metal sound voice run walk sing read write draw build carry throw catch open close begin
finish watch listen answer follow travel gather small large quick slow early late warm cold bright dark heavy
soft round empty quiet simple under above near behind before after while until because always never often today
again one two three four five six seven eight nine ten"""
WORDS = SHORT_WORDS.split()


class Maker(Protocol):
    """Makes random parts of prompts, and prompts of parts."""

    def part(self, chance: random.Random, length: int) -> list[Any]:
        """A random part of about so many tokens."""

    def prompt(self, parts: Sequence[list[Any]]) -> str | list[int]:
        """The parts in a row."""


class Ids:
    """Prompts of token ids, of exactly the lengths asked for."""

    def part(self, chance: random.Random, length: int) -> list[Any]:
        """``length`` random ids."""
        return [chance.randint(FIRST_ID, LAST_ID) for _ in range(length)]

    def prompt(self, parts: Sequence[list[Any]]) -> str | list[int]:
        """All ids."""
        return [token for part in parts for token in part]


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts of common words.

    Attributes:
        per_word: tokens of a word. around: tokens that the server puts around a prompt (template, begin token).
    """

    per_word: float = 1.0
    around: float = 0.0

    @classmethod
    def measured(cls, short: tuple[int, int], long: tuple[int, int]) -> "Texts":
        """From two prompts that were sent: (words, tokens counted by the server)."""
        per_word = (long[1] - short[1]) / (long[0] - short[0])
        return cls(per_word, max(short[1] - per_word * short[0], 0.0)) if per_word > 0 else cls()

    def part(self, chance: random.Random, length: int) -> list[Any]:
        """Random words of about ``length`` tokens."""
        return chance.choices(WORDS, k=max(round(length / self.per_word), 1)) if length else []

    def prompt(self, parts: Sequence[list[Any]]) -> str | list[int]:
        """The words, less as many as make up for what the server puts around them; one is left."""
        words = [word for part in parts for word in part]
        return " ".join(words[:max(len(words) - round(self.around / self.per_word), 1)])


def spread(count: int, input_len: int, output_len: int, ratio: float, seed: int) -> list[tuple[int, int]]:
    """``count`` pairs of prompt and output tokens, uniform within ``ratio`` of the given ones; ConfigError names a bad one."""
    for name, value in (("num_prompts", count), ("random_input_len", input_len), ("random_output_len", output_len)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.", name)
    if not 0 <= ratio < 1:
        raise ConfigError(f"random_range_ratio must be in [0, 1), got {ratio}.", "random_range_ratio")
    chance = random.Random(seed)

    def near(length: int) -> int:
        return chance.randint(max(math.floor(length * (1 - ratio)), 1), math.ceil(length * (1 + ratio)))

    return [(near(input_len), near(output_len)) for _ in range(count)]


def random_prompts(maker: Maker, lengths: Sequence[tuple[int, int]], seed: int, prefix_len: int = 0) -> list[Asked]:
    """Requests of the given lengths; all begin with the same ``prefix_len`` tokens, which come on top of their own."""
    if prefix_len < 0:
        raise ConfigError(f"random_prefix_len must be 0 or more, got {prefix_len}.", "random_prefix_len")
    chance = random.Random(seed)
    prefix = maker.part(chance, prefix_len)
    return [Asked(maker.prompt([prefix, maker.part(chance, prompt)]), prefix_len + prompt, output)
            for prompt, output in lengths]


def repeated_prefixes(maker: Maker, count: int, num_prefixes: int, prefix_len: int, suffix_len: int, output_len: int,
                      seed: int) -> list[Asked]:
    """Requests that share ``num_prefixes`` prefixes evenly, each with an end of its own, in random order."""
    for name, value in (("num_prompts", count), ("prefix_repetition_num_prefixes", num_prefixes),
                        ("prefix_repetition_prefix_len", prefix_len), ("prefix_repetition_suffix_len", suffix_len),
                        ("prefix_repetition_output_len", output_len)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.", name)
    chance = random.Random(seed)
    prefixes = [maker.part(chance, prefix_len) for _ in range(num_prefixes)]
    asked = [Asked(maker.prompt([prefixes[i % num_prefixes], maker.part(chance, suffix_len)]), prefix_len + suffix_len,
                   output_len) for i in range(count)]
    chance.shuffle(asked)
    return asked


Count = Callable[[Sequence[str]], Awaitable[list[int]]]  # texts -> tokens of each


async def custom(path: str, output_len: int, num_prompts: int | None, count: Count) -> list[Asked]:
    """Requests of a file of JSON lines ``{"prompt": text, "output_tokens": optional}``, in its order.

    Args:
        output_len: most tokens of an answer whose line names none. num_prompts: the first so many; None takes all.
    """
    rows: list[tuple[str, int]] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        tokens = entry.get("output_tokens", output_len) if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt or type(tokens) is not int or tokens < 1:
            raise ConfigError(f'dataset_path {path!r} line {number} must be {{"prompt": text}}, got {line[:100]!r}.',
                              "dataset_path")
        rows.append((prompt, tokens))
    rows = rows[:_available(path, len(rows), num_prompts)]
    lengths = await count([prompt for prompt, _ in rows])
    return [Asked(prompt, length, tokens) for (prompt, tokens), length in zip(rows, lengths, strict=True)]


async def sharegpt(path: str, output_len: int | None, num_prompts: int | None, seed: int, count: Count) -> list[Asked]:
    """Requests of a ShareGPT file: the first turn of each conversation, to be answered with as many tokens as the second.

    Pairs with less than 4 tokens, prompts of more than 1024 and pairs of more than 2048 are left out, as is usual with
    this data. ``output_len``: length of every answer instead of the recorded one's.
    """
    try:
        entries = json.loads(_read(path))
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise ConfigError(f"dataset_path {path!r} must hold a JSON list of conversations.", "dataset_path")
    pairs = [pair for entry in entries if (pair := _turns(entry)) is not None]
    random.Random(seed).shuffle(pairs)
    found: list[Asked] = []
    for slice_of in _slices(pairs, 64):
        counts = iter(await count([text for pair in slice_of for text in pair]))
        for prompt, _ in slice_of:
            length, answer = next(counts), next(counts)
            tokens = answer if output_len is None else output_len
            if length >= 4 and (output_len is not None or tokens >= 4) and length <= 1024 and length + tokens <= 2048:
                found.append(Asked(prompt, length, tokens))
        if num_prompts is not None and len(found) >= num_prompts:
            break
    return found[:_available(path, len(found), num_prompts)]


def _turns(entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    first, second = texts
    return (first, second) if isinstance(first, str) and isinstance(second, str) and first and second else None


def _slices(pairs: list[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    for at in range(0, len(pairs), size):
        yield pairs[at:at + size]


def _available(path: str, count: int, num_prompts: int | None) -> int:
    if not count or (num_prompts is not None and not 1 <= num_prompts <= count):
        raise ConfigError(f"num_prompts must be from 1 to the {count} usable prompts of {path!r}, got {num_prompts}.",
                          "num_prompts")
    return num_prompts or count


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset_path {path!r} cannot be read: {error}.", "dataset_path") from None
