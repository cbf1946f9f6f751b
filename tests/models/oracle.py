"""The shared harness of the family tests: a tiny random checkpoint, its logits by transformers, and ours.

Owns the making of checkpoints (weights wide enough that logits are far from flat, norms and biases away from 1 and 0)
and the paged cache with shuffled blocks. Families only say which configs to try.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from octavo.config import EngineConfig
from octavo.models.decoder import Decoder
from octavo.models.loader import load_model
from octavo.models.source import ModelSource
from octavo.ops.attention import AttentionMeta

BLOCK_SIZE = 8
NEW_TOKENS = 24


def make_checkpoint(folder: Path, config: Any, *, seed: int = 0, **save: Any) -> Any:
    """A random float32 model of a transformers config, saved to folder; the model is returned in eval mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                table = any(part in name for part in ("embed", "wte", "wpe"))
                scale = 1.0 if table else 1.4 / math.sqrt(parameter.shape[-1])
                parameter.normal_(0.0, scale)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, **save)
    return model


def build(folder: Path, *, max_model_len: int = 128, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a saved checkpoint, by the loader."""
    config = json.loads((folder / "config.json").read_text())
    source = ModelSource(kind="folder", path=folder, config=config, name=str(folder))
    return load_model(source, EngineConfig(model=str(folder)), dtype, max_model_len)


class PagedCache:
    """A pool of shuffled blocks and the metadata of one sequence, or of several that begin alike in length."""

    def __init__(self, decoder: Decoder, num_tokens: int, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> None:
        s = decoder.spec
        per_row = -(-num_tokens // BLOCK_SIZE)
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(3 * per_row, generator=generator).to(torch.int32)
        self.tables = torch.stack((shuffled[:per_row], shuffled[per_row : 2 * per_row]))
        # What no sequence wrote is NaN: reading it by mistake cannot go unseen.
        shape = (s.num_layers, 2, 3 * per_row, BLOCK_SIZE, s.num_kv_heads, s.head_dim)
        self.kv = torch.full(shape, math.nan, dtype=dtype)

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        """Slots of tokens start .. end of a row."""
        at = torch.arange(start, end)
        return self.tables[row, at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE

    def meta(self, spans: Sequence[tuple[int, int, int]]) -> AttentionMeta:
        """Metadata of a step that computes tokens start .. end of each (row, start, end)."""
        lengths = [end - start for _, start, end in spans]
        return AttentionMeta(
            block_tables=self.tables,
            rows=torch.tensor([row for row, _, _ in spans], dtype=torch.int32),
            query_start=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
            context_len=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
            slots=torch.cat([self.slots(*span) for span in spans]),
            max_query=max(lengths),
            max_context=max(end for _, _, end in spans),
        )


def run(decoder: Decoder, cache: PagedCache, ids: torch.Tensor, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Logits [tokens, vocab] of the spans, each (row, start, end) of the same ids [length]."""
    chosen = torch.cat([ids[start:end] for _, start, end in spans])
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    return decoder.logits(decoder.forward(chosen, positions, cache.kv, cache.meta(spans)))


def logits_in_chunks(decoder: Decoder, ids: torch.Tensor, chunks: Sequence[int], **cache: Any) -> torch.Tensor:
    """Logits at every position, computed through the cache in chunks of the given sizes; the rest is the last chunk."""
    pool, start, parts = PagedCache(decoder, len(ids), **cache), 0, []
    for size in (*chunks, len(ids)):
        end = min(start + size, len(ids))
        if end > start:
            parts.append(run(decoder, pool, ids, [(1, start, end)]))
        start = end
    return torch.cat(parts)


def greedy(decoder: Decoder, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """The most likely continuation, one token at a time."""
    ids, start, tokens = prompt, 0, []
    cache = PagedCache(decoder, len(prompt) + num_tokens)
    for _ in range(num_tokens):
        logits = run(decoder, cache, ids, [(0, start, len(ids))])
        tokens.append(int(logits[-1].argmax()))
        start, ids = len(ids), torch.cat((ids, torch.tensor(tokens[-1:])))
    return tokens


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to tolerance, relative to the spread of the logits."""
    assert ours.shape == theirs.shape
    spread = float(theirs.std())
    assert spread > 0.3, f"logits are nearly flat ({spread}): they would prove nothing"
    worst = float((ours - theirs).abs().max()) / spread
    assert worst < tolerance, f"largest difference is {worst} of the spread"


def check_family(decoder: Decoder, model: Any, *, num_tokens: int = 45, seed: int = 2) -> None:
    """As transformers: logits of a whole prompt, of chunks, of two sequences in a step; greedy tokens."""
    ids = torch.randint(0, decoder.spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        theirs = model(ids[None]).logits[0].float()
    assert_close(logits_in_chunks(decoder, ids, ()), theirs)
    assert_close(logits_in_chunks(decoder, ids, (1, 7)), theirs)
    cache = PagedCache(decoder, num_tokens)
    first = run(decoder, cache, ids, [(1, 0, 5), (0, 0, 11)])
    second = run(decoder, cache, ids, [(0, 11, 12), (1, 5, num_tokens)])
    assert_close(first[5:], theirs[:11])
    assert_close(torch.cat((first[:5], second[1:])), theirs)
    assert_close(second[:1], theirs[11:12])
    assert greedy(decoder, ids[:9], NEW_TOKENS) == _their_greedy(model, ids[:9])


def _their_greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat((ids, model(ids[None], use_cache=False).logits[0, -1].argmax()[None]))
    return [int(i) for i in ids[len(prompt) :]]
