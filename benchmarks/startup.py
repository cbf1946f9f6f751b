"""Time from the start of a process to its first token, on made-up weights or on a checkpoint written for the purpose.

Owns the processes that are timed and the writing of the checkpoint; benchmarks/engine_gpu.py calls it and names the figures.
A process of its own imports torch and multiplies two matrices on the device: what that takes is nobody's merit, and is taken
off. The cache folder of the engine is an empty one, so that nothing of an earlier start can help; the files of Python and torch
are in the page cache on both sides, because one process has run before the first that counts.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 180.0  # seconds that a start may take before it is given up
SHARDS = 4
BLOCK = 1 << 25  # random elements that the tensors of a checkpoint are cut from

TORCH = """
import json, sys, time
import torch
device = sys.argv[1]
a = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
assert float((a @ a)[0, 0]) == 1024
product = time.monotonic()
link = 0.0
if device == "cuda":  # how fast weights could come over from the host's memory
    host = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
    there = host.to(device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    there.copy_(host)
    torch.cuda.synchronize()
    link = host.numel() / (time.perf_counter() - begin)
print(json.dumps([product, link]))
"""

ENGINE = """
import json, sys, time
from octavo import LLM, SamplingParams
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
ready = time.monotonic()
params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": list(range(5, 21))}], params, use_tqdm=False)
first = time.monotonic()
assert len(outputs[0].outputs[0].token_ids) == 1, outputs
print(json.dumps([ready, first]))
"""


@dataclass(frozen=True)
class Base:
    """Seconds of a process until torch's first product on the device; bytes a second from pinned memory (0: not a GPU)."""

    seconds: float
    link: float


@dataclass(frozen=True)
class Start:
    """Seconds of a process until the engine was ready, and until its first token."""

    ready: float
    first_token: float


def torch_alone(device: str) -> Base:
    """Import torch and multiply, twice: the first process brings the files into the page cache and does not count."""
    _process(TORCH, device)
    start, (product, link) = _process(TORCH, device)
    return Base(product - start, link)


def engine(model: str, options: dict[str, Any]) -> Start:
    """Load a model and compute one token."""
    start, (ready, first) = _process(ENGINE, model, json.dumps(options))
    return Start(ready - start, first - start)


def _process(program: str, *words: str) -> tuple[float, list[float]]:
    """When a Python process was started, on the machine's monotonic clock, and the numbers that it printed last."""
    with tempfile.TemporaryDirectory() as empty:
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, env={**os.environ, "OCTAVO_CACHE": empty},
                              capture_output=True, text=True, timeout=LONGEST)
    if done.returncode:
        raise RuntimeError(f"a process that should give a first token ended with {done.returncode}: {done.stderr[-2000:]}")
    return start, json.loads(done.stdout.splitlines()[-1])


# A checkpoint


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint."""
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise ValueError(f"a checkpoint is written for Llama models only, not for {config['architectures']}")
    hidden, vocab, wide = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * dim, (config.get("num_key_value_heads") or config["num_attention_heads"]) * dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= {layer + "input_layernorm.weight": (hidden,), layer + "post_attention_layernorm.weight": (hidden,)}
        found |= {f"{layer}self_attn.{part}_proj.weight": (rows, hidden) for part, rows in (("q", q), ("k", kv), ("v", kv))}
        found[layer + "self_attn.o_proj.weight"] = (hidden, q)
        found |= {f"{layer}mlp.{part}_proj.weight": (wide, hidden) for part in ("gate", "up")}
        found[layer + "mlp.down_proj.weight"] = (hidden, wide)
    return found


def room_for(num_bytes: int) -> Path:
    """A folder with room for a checkpoint: shared memory, which is page cache by nature, else the temporary folder."""
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if folder.is_dir() and shutil.disk_usage(folder).free > 1.05 * num_bytes:
            return folder
    raise RuntimeError(f"neither /dev/shm nor {tempfile.gettempdir()} has room for a checkpoint of {num_bytes / 2**30:.1f} GiB")


def checkpoint_bytes(config: dict[str, Any]) -> int:
    """Size of the tensors in bf16."""
    return sum(2 * _count(shape) for shape in tensors_of(config).values())


def write_checkpoint(model: Path, folder: Path) -> int:
    """Write random bf16 weights for ``model``'s config as safetensors shards with an index; returns their bytes."""
    import torch

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shapes = tensors_of(config)
    total = checkpoint_bytes(config)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled > total * len(shards) / SHARDS:
            shards.append([])
        shards[-1].append(name)
        filled += 2 * _count(shape)
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.uint8).numpy()
    ones = torch.ones(max(s[0] for s in shapes.values() if len(s) == 1)).bfloat16().view(torch.uint8).numpy()
    names = {name: f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i, shard in enumerate(shards) for name in shard}

    def write(shard: list[str]) -> None:
        header, at = {}, 0
        for name in shard:
            end = at + 2 * _count(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / names[shard[0]]).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for i, name in enumerate(shard):
                left = 2 * _count(shapes[name])
                source, start = (ones, 0) if len(shapes[name]) == 1 else (block, 2 * (i * 7919 % BLOCK))
                while left:
                    part = source[start : start + left]
                    file.write(memoryview(part))
                    left, start = left - len(part), 0

    with ThreadPoolExecutor(SHARDS) as pool:
        list(pool.map(write, shards))
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    shutil.copy(model / "config.json", folder / "config.json")
    return total


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
