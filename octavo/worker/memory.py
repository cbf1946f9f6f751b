"""Memory: where every byte goes, computed from the spec and the options before anything is loaded.

Owns the arithmetic of weights, the largest step, the KV pool and the host pool, and the options that depend on them
(dtype, model length, rows, budget). It allocates nothing and never measures a run. Invariant: what a MemoryPlan says is
what the worker allocates; an explicit option that does not fit is a ConfigError with the numbers, a default is fitted.

The size of the KV pool, first rule that applies:
  1. ``num_gpu_blocks_override`` blocks;
  2. ``kv_cache_memory_bytes``;
  3. on a GPU, gpu_memory_utilization * total memory, less what is taken already and everything else;
  4. on a CPU, the smallest of: what max_num_seqs sequences of max_model_len need, 4 GiB, and
     gpu_memory_utilization * available memory less everything else.
"""

from dataclasses import dataclass

import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError, ModelError
from octavo.layers.workspace import aligned
from octavo.models.decoder import residual_dtype
from octavo.models.source import ModelSource
from octavo.models.spec import DecoderSpec, RopeSpec
from octavo.ops.fused import SKINNY_ROWS
from octavo.ops.reference import PANEL
from octavo.worker.attention_sizes import attention_sizes
from octavo.worker.gpu import usable
from octavo.worker.machine import GIB, Machine, size_text
from octavo.worker.sampler import PROMPT_TILE
from octavo.worker.staging import capacity

CPU_POOL = 4 * GIB
HOST_SHARE = 0.7  # most of the host's memory that swap_space may ask for
CUDA_RESERVE = GIB  # context, libraries, graphs
STAGED = 64 * 2**20  # bytes of a half of the staging for blocks that move to the host or back
CUDA_ROWS = 2048  # sequences that one work list of attention holds
FLOAT = 4
DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
FP8 = ("fp8", "fp8_e4m3")
DEFAULTS = {"cpu": (64, 2048), "cuda": (1024, 16384)}  # max_num_seqs, max_num_batched_tokens
SERVING = (256, 8192)  # the same for a server on a GPU: people wait for its next token


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One line of the table. how: the arithmetic in words."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a worker will allocate, and what follows from it.

    Attributes:
        rows: device memory, line by line. host: host memory for swapping.
        dtype, kv_dtype: of weights and KV cache. block_bytes: of one block, all layers, K and V.
        num_blocks, num_host_blocks, block_size. num_staged: blocks in a half of the staging of moves (0 on a CPU).
        max_model_len: fitted. max_num_seqs, max_num_batched_tokens: resolved.
        window_waste: bytes that one sequence of max_model_len keeps although its layers with a window never read them.
        notes: what was fitted, in sentences.
    """

    rows: tuple[MemoryRow, ...]
    host: MemoryRow
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_bytes: int
    num_blocks: int
    num_host_blocks: int
    num_staged: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    window_waste: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return sum(row.bytes for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens whose KV fits."""
        return self.num_blocks * self.block_size

    @property
    def full_sequences(self) -> int:
        """Sequences of max_model_len that fit at the same time."""
        return self.num_blocks // _ceil(self.max_model_len, self.block_size)


def resolve_device(config: EngineConfig) -> str:
    """cpu or cuda; auto is the GPU where torch sees one and the CUDA kernels are built."""
    if config.device == "auto":
        return "cuda" if usable() else "cpu"
    return config.device


def resolve_dtype(config: EngineConfig, source: ModelSource) -> torch.dtype:
    """The type of the weights. "auto": the checkpoint's, float32 where it names none.

    On a CPU float16 becomes bfloat16, and so do the quantised weights of a GGUF file; what says float32 stays float32.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    named = str(source.config.get("dtype") or source.config.get("torch_dtype") or "").removeprefix("torch.")
    if source.kind == "gguf" and named != "float32":
        return torch.bfloat16
    if named and named not in DTYPES:
        raise ModelError(f"the checkpoint's dtype {named!r} is not supported; choose one with dtype.", "dtype")
    dtype = DTYPES[named or "float32"]
    return torch.bfloat16 if dtype == torch.float16 and resolve_device(config) == "cpu" else dtype


def plan_memory(spec: DecoderSpec, config: EngineConfig, dtype: torch.dtype, machine: Machine) -> MemoryPlan:
    """The whole table for one device.

    Raises:
        ConfigError: something explicit does not fit, or nothing does; the message has the numbers.
    """
    wanted = config.max_model_len or spec.max_len
    if wanted > spec.max_len:
        raise ConfigError(
            f"max_model_len {wanted} is more than the {spec.max_len} positions that the model was made for.",
            "max_model_len",
        )
    num_seqs, budget = _limits(config, machine.device, wanted)
    kv_dtype = _kv_dtype(config, machine.device, dtype)
    block_bytes = token_bytes(spec, kv_dtype) * config.block_size
    staged = _staged(config, machine, block_bytes)
    staging = MemoryRow("staging", 2 * staged * block_bytes, f"2 x {staged} blocks on their way to the host or back")
    extra = (staging,) if staged else ()
    rows = (*_fixed_rows(spec, dtype, machine, wanted, num_seqs, budget, config.block_size), *extra)
    fixed = sum(row.bytes for row in rows)
    num_blocks, how = _pool(config, machine, fixed, block_bytes, num_seqs * _ceil(wanted, config.block_size))
    notes = []
    fitted = min(wanted, num_blocks * config.block_size)
    if fitted < wanted and config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len {wanted} does not fit the KV pool: {num_blocks} blocks of {config.block_size} hold "
            f"{fitted} tokens ({size_text(num_blocks * block_bytes)}, {how}); "
            f"{size_text(wanted * block_bytes // config.block_size)} are needed.",
            "max_model_len",
        )
    if fitted < wanted:
        rows = (*_fixed_rows(spec, dtype, machine, fitted, num_seqs, budget, config.block_size), *extra)
        notes.append(f"max_model_len is {fitted}: the model could take {wanted} tokens, the KV pool holds {fitted}.")
    pool = MemoryRow(
        "KV pool", (num_blocks + 1) * block_bytes, f"{num_blocks} blocks + 1 scratch x {size_text(block_bytes)}; {how}"
    )
    left = (
        int(config.gpu_memory_utilization * machine.available) - fixed - pool.bytes if machine.device == "cpu" else None
    )
    num_host, note = _host_blocks(config, machine, block_bytes, num_blocks, left)
    return MemoryPlan(
        rows=(*rows, pool),
        host=MemoryRow("host pool", num_host * block_bytes, f"{num_host} blocks; {note}"),
        dtype=dtype,
        kv_dtype=kv_dtype,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        num_host_blocks=num_host,
        num_staged=staged,
        block_size=config.block_size,
        max_model_len=fitted,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget,
        window_waste=window_waste(spec, kv_dtype, fitted),
        notes=tuple(notes),
    )


def _kv_dtype(config: EngineConfig, device: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the KV cache: any plain one on a CPU; on a GPU the weights' own, or 8-bit."""
    named = config.kv_cache_dtype
    if named == "auto":
        return dtype
    if named in FP8:
        if device == "cpu":
            raise ConfigError(
                f"kv_cache_dtype {named} needs a GPU; a CPU's cache is float32, bfloat16 or float16.", "kv_cache_dtype")
        return torch.float8_e4m3fn
    if device == "cuda" and DTYPES[named] != dtype:
        raise ConfigError(
            f"kv_cache_dtype {named} must be the type of the weights on a GPU ({dtype_name(dtype)}), or fp8.", "kv_cache_dtype")
    return DTYPES[named]


def token_bytes(spec: DecoderSpec, kv_dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * kv_dtype.itemsize


def window_waste(spec: DecoderSpec, kv_dtype: torch.dtype, length: int) -> int:
    """Bytes of a sequence of ``length`` that layers with a window keep and never read again."""
    per_layer = 2 * spec.num_kv_heads * spec.head_dim * kv_dtype.itemsize
    return sum(max(0, length - layer.window) * per_layer for layer in spec.layers if layer.window)


def weight_bytes(spec: DecoderSpec, dtype: torch.dtype, max_model_len: int, panel: int = PANEL) -> int:
    """Bytes of all parameters as the decoder stores them: matrices in panels of so many rows, vectors in float32."""
    s, size, width = spec, dtype.itemsize, spec.embedding_dim or spec.hidden

    def matrix(rows: int, columns: int) -> int:
        return _ceil(rows, panel) * panel * columns * size

    q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    up = s.intermediate * (1 + s.gated)
    norm = s.hidden * (1 + (s.norm == "layer" and s.norm_bias))
    vectors = norm * (4 if s.norm_placement == "sandwich" else 2) + 2 * s.head_dim * s.qk_norm
    vectors += (q + 2 * kv) * s.qkv_bias + s.hidden * s.out_bias + (up + s.hidden) * s.mlp_bias
    layer = matrix(q + 2 * kv, s.hidden) + matrix(s.hidden, q) + matrix(up, s.hidden) + matrix(s.hidden, s.intermediate)
    ends = matrix(s.vocab_size, width) + (0 if s.tied else s.vocab_size * width * size)
    if width != s.hidden:
        ends += matrix(s.hidden, width) + matrix(width, s.hidden)
    tables = s.positions * s.hidden + sum(max_model_len * rope.rotary_dim for rope in _distinct(s.ropes))
    vectors = vectors * s.num_layers + norm * s.final_norm + s.vocab_size * s.head_bias
    return layer * s.num_layers + ends + (tables + vectors) * FLOAT


def step_bytes(spec: DecoderSpec, tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a step's buffers as Decoder.forward takes them: normed, embedded and residual vectors, and the larger of
    attention's and MLP's sets.

    Args:
        dtype: of the activations.
    """
    s, size = spec, dtype.itemsize
    unit = aligned(1) // size
    q, mlp = s.num_heads * s.head_dim, s.intermediate * (1 + s.gated)
    qkv = q + 2 * s.num_kv_heads * s.head_dim
    shared = max(_ceil(tokens * qkv, unit) * unit + tokens * q, _ceil(tokens * mlp, unit) * unit + tokens * s.intermediate)
    residual = residual_dtype(s, dtype).itemsize
    columns = s.embedding_dim or s.hidden
    fused = min(tokens, SKINNY_ROWS) * s.hidden * residual if residual > size else 0
    vectors = (tokens * s.hidden * size, tokens * columns * size, tokens * s.hidden * residual, fused)
    wide = 2 * tokens * s.hidden * size if columns != s.hidden or s.positions else 0  # before the first layer, in torch's hands
    return sum(map(aligned, (*vectors, shared * size))) + wide


def _fixed_rows(
    spec: DecoderSpec, dtype: torch.dtype, machine: Machine, length: int, num_seqs: int, budget: int, block_size: int
) -> tuple[MemoryRow, ...]:
    """Everything but the KV pool."""
    logits = max(num_seqs, PROMPT_TILE) * spec.vocab_size * FLOAT
    on_gpu = machine.device == "cuda"
    act = dtype if on_gpu else torch.float32
    if on_gpu:
        tables = 4 * (num_seqs * (_ceil(length, block_size) + 40) + 7 * budget + capacity(num_seqs, budget))
    else:
        tables = num_seqs * (length + 1 + _ceil(length, block_size) + 20) * 4
    rows = [
        MemoryRow(
            "weights",
            weight_bytes(spec, dtype, length, 1 if on_gpu else PANEL),
            f"{spec.num_layers} layers, {spec.vocab_size} tokens, {dtype_name(dtype)}",
        ),
        MemoryRow("activations", step_bytes(spec, budget, act), f"a step of {budget} tokens, {dtype_name(act)}"),
        MemoryRow(
            "logits",
            2 * logits,
            f"{max(num_seqs, PROMPT_TILE)} rows x {spec.vocab_size}, float32, and a copy for logprobs",
        ),
        MemoryRow("row tables", tables, f"{num_seqs} rows of {length} tokens{'' if on_gpu else ', touched as they grow'}"),
        MemoryRow(
            "penalties",
            num_seqs * spec.vocab_size * 5,
            f"{num_seqs} rows x {spec.vocab_size} counters{'' if on_gpu else ', touched by rows that ask'}",
        ),
    ]
    if on_gpu:
        sizes = attention_sizes(spec, dtype, num_seqs, budget, length)
        how = f"lists of {num_seqs} sequences, room for {sizes.max_partials} partial results"
        rows.append(MemoryRow("attention", sizes.bytes, how))
        rows.append(MemoryRow("reserve", CUDA_RESERVE, "libraries, graphs, sampling of rows that ask for more than a token"))
    return tuple(rows)


def _limits(config: EngineConfig, device: str, length: int) -> tuple[int, int]:
    """max_num_seqs and max_num_batched_tokens; without chunks a step must take the longest prompt."""
    seqs_default, budget_default = DEFAULTS[device]
    num_seqs = config.max_num_seqs
    if num_seqs is None:
        num_seqs = min(seqs_default, config.max_num_batched_tokens or seqs_default)
    if device == "cuda" and num_seqs > CUDA_ROWS:
        raise ConfigError(f"max_num_seqs must be at most {CUDA_ROWS} on a GPU, got {num_seqs}.", "max_num_seqs")
    longest = 0 if config.enable_chunked_prefill else length
    budget = config.max_num_batched_tokens or max(budget_default, num_seqs, longest)
    if budget < longest:
        raise ConfigError(
            f"max_num_batched_tokens ({budget}) must be at least max_model_len ({length}) without chunked prefill.",
            "max_num_batched_tokens",
        )
    return num_seqs, budget


def _pool(config: EngineConfig, machine: Machine, fixed: int, block_bytes: int, useful: int) -> tuple[int, str]:
    """Blocks of the pool and the rule that gave them."""
    share, on_cpu = config.gpu_memory_utilization, machine.device == "cpu"
    memory = machine.available if on_cpu else machine.total
    measured = f"{size_text(memory)} {'available' if on_cpu else 'of the device'}"
    taken = 0 if on_cpu else machine.total - machine.available
    left = int(share * memory) - taken - fixed - block_bytes  # one is the scratch block
    if taken:
        measured += f" ({size_text(taken)} of them are taken already)"
    how = param = "gpu_memory_utilization"
    if config.num_gpu_blocks_override is not None:
        num_blocks, how = config.num_gpu_blocks_override, "num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes is not None:
        num_blocks, how = config.kv_cache_memory_bytes // block_bytes, "kv_cache_memory_bytes"
        if num_blocks < 1:
            raise ConfigError(
                f"kv_cache_memory_bytes {config.kv_cache_memory_bytes} holds no block: one takes {block_bytes} bytes.",
                how,
            )
    else:
        num_blocks, how = left // block_bytes, f"what is left of {100 * share:g}% of {measured}"
        most = min(useful, CPU_POOL // block_bytes)
        if on_cpu and most < num_blocks:
            fits_all = "all that max_num_seqs sequences of max_model_len need"
            num_blocks, how = most, fits_all if most == useful else f"the CPU default of {size_text(CPU_POOL)}"
        if num_blocks < 1:
            raise ConfigError(
                f"the KV pool would have no block: {100 * share:g}% of {measured} leaves {size_text(max(left, 0))} after "
                f"{size_text(fixed)} for weights and workspace, and one block takes {size_text(block_bytes)}.",
                param,
            )
    needed = fixed + (num_blocks + 1) * block_bytes
    if needed > memory - taken:
        raise ConfigError(
            f"{how} asks for {num_blocks} blocks ({size_text(num_blocks * block_bytes)}): with weights and workspace "
            f"that makes {size_text(needed)}, and there are {measured}.",
            how if how in ("num_gpu_blocks_override", "kv_cache_memory_bytes") else param,
        )
    return num_blocks, how


def _staged(config: EngineConfig, machine: Machine, block_bytes: int) -> int:
    """Blocks in a half of the staging of a GPU: 0 when nothing can move."""
    most = int(config.swap_space * GIB) // block_bytes
    return min(most, max(1, STAGED // block_bytes)) if machine.device == "cuda" else 0


def _host_blocks(
    config: EngineConfig, machine: Machine, block_bytes: int, num_blocks: int, left: int | None
) -> tuple[int, str]:
    """Blocks of the host pool: swap_space, at most twice the device pool, and on a CPU at most what is ``left``."""
    wanted, limit = int(config.swap_space * GIB), int(HOST_SHARE * machine.host_total)
    default = config.swap_space == EngineConfig.__dataclass_fields__["swap_space"].default
    if wanted > limit and not default:
        raise ConfigError(
            f"swap_space {config.swap_space:g} GiB is more than {HOST_SHARE:.0%} of the host's "
            f"{size_text(machine.host_total)}.",
            "swap_space",
        )
    choices = [
        (min(wanted, limit) // block_bytes, f"swap_space {config.swap_space:g} GiB"),
        (2 * num_blocks, "twice the KV pool"),
    ]
    if left is not None:
        choices.append((max(left, 0) // block_bytes, "what is left of the host's memory"))
    return min(choices)


def _distinct(ropes: tuple[RopeSpec, ...]) -> list[RopeSpec]:
    return list(dict.fromkeys(ropes))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")
