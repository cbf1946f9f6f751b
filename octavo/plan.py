"""StepPlan and StepResult: the only things that travel between the scheduler and a worker, and what a worker is.

Owns the vocabulary of a step; it does not know requests, text or tensors. A plan says *compute tokens
[start, start + count) of row r* and carries changes only: new rows, appended blocks, ended rows.

Order in which a worker applies a plan: ``ended``, ``swap_out``, ``copies`` of whole blocks, ``swap_in``, ``new``,
``append_*``, ``forced_*``, then the computation, then sampling. Swap-outs read a block before anybody reuses it.

Invariant: a worker that applies the same plans in the same order holds the same tables, to the bit. Plans carry an
epoch and a step number; a gap or a repetition is a loud error. Arrays are numpy, contiguous, of the dtype stated.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

Constraint = Callable[[Int32, Int32], bool]
"""What decides which tokens a row may sample, made by the host: (its output so far, int32 words [ceil(vocab / 32)] that get
bit ``i % 32`` of word ``i // 32`` for every token i that may follow) -> False when it has failed."""


def _empty() -> Int32:
    return np.empty(0, np.int32)


def _pairs() -> Int32:
    return np.empty((0, 2), np.int32)


class RowSampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a row samples; resolved values only (a seed is always there).

    Attributes:
        temperature, top_k (0: off), top_p, min_p, presence, frequency, repetition: as SamplingParams.
        seed: uint64 key of the random generator. index: which of the n continuations, second word of its counter.
        logprobs: -1 off, else how many top entries come up with every token. prompt_logprobs: the same for the prompt.
        logit_bias: ids and values. allowed: ids or None. bad_words: token sequences.
        min_tokens, stop_ids: while fewer than min_tokens are generated, stop_ids (end tokens included) are masked.
        processors: the row has logits processors registered with the group (offline only).
        constrained: the row has a Constraint registered there. It decides first: allowed, bad_words and the mask of stop_ids
            hold as long as they leave it a token.
        beam: the row never samples by itself; its top ``logprobs`` come up and the host forces its next token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    index: int = 0
    logprobs: int = -1
    prompt_logprobs: int = -1
    bias_ids: tuple[int, ...] = ()
    bias_values: tuple[float, ...] = ()
    allowed: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    processors: bool = False
    constrained: bool = False
    beam: bool = False


class NewRow(msgspec.Struct):
    """A row that starts (or starts again after preemption, or is a fork).

    Attributes:
        row, generation: the slot and its owner's number.
        tokens: int32 [known tokens]: prompt and, after preemption or in a fork, output so far.
        num_prompt: how many of them are prompt. start: tokens whose KV is already in the blocks.
        blocks: int32 block ids of the row's table, in order.
        sampling: how it samples.
    """

    row: int
    generation: int
    tokens: Int32
    num_prompt: int
    start: int
    blocks: Int32
    sampling: RowSampling


class StepPlan(msgspec.Struct, kw_only=True):
    """One step's work.

    Attributes:
        epoch, step: identity; step counts from 0 without gaps inside an epoch.
        rows, starts, counts: int32 [R]; row r computes tokens [start, start + count). Each row at most once,
            count >= 1. ``starts`` is the host's view; a worker asserts it against its own lengths in debug mode.
        sample_rows: int32 [S] rows that sample after the computation, each at most once.
        sample_from: int32 [S] index into ``rows`` whose last token's logits are used (siblings of n > 1 share one).
        sample_pos: int32 [S] index that the sampled token gets in its row; third word of the random counter.
        sample_generations: int32 [S] generation of each sampling row.
        new: rows that start. ended: int32 rows whose owner is gone.
        append_rows, append_index, append_blocks: int32 [A]; block table[row, index] = block. No entry comes twice, nor one that
            ``new`` fills: a GPU writes them all at once.
        forced_rows, forced_tokens: int32 [F] tokens chosen by the host, appended to the row before the computation.
        copies: int32 [N, 2] device block src -> dst. swap_out: device -> host block. swap_in: host -> device block.
    """

    epoch: int
    step: int
    rows: Int32 = msgspec.field(default_factory=_empty)
    starts: Int32 = msgspec.field(default_factory=_empty)
    counts: Int32 = msgspec.field(default_factory=_empty)
    sample_rows: Int32 = msgspec.field(default_factory=_empty)
    sample_from: Int32 = msgspec.field(default_factory=_empty)
    sample_pos: Int32 = msgspec.field(default_factory=_empty)
    sample_generations: Int32 = msgspec.field(default_factory=_empty)
    new: list[NewRow] = []
    ended: Int32 = msgspec.field(default_factory=_empty)
    append_rows: Int32 = msgspec.field(default_factory=_empty)
    append_index: Int32 = msgspec.field(default_factory=_empty)
    append_blocks: Int32 = msgspec.field(default_factory=_empty)
    forced_rows: Int32 = msgspec.field(default_factory=_empty)
    forced_tokens: Int32 = msgspec.field(default_factory=_empty)
    copies: Int32 = msgspec.field(default_factory=_pairs)
    swap_out: Int32 = msgspec.field(default_factory=_pairs)
    swap_in: Int32 = msgspec.field(default_factory=_pairs)


class RowLogprobs(msgspec.Struct):
    """Logprobs of some positions of one row.

    Attributes:
        row: slot. start: prompt index of the first position (prompt logprobs), else the sampled token's index.
        tokens, logprobs, ranks: [positions] of the sampled or prompt tokens.
        top_tokens, top_logprobs: [positions, k], best first, ties to the lower id.
    """

    row: int
    start: int
    tokens: Int32
    logprobs: Float32
    ranks: Int32
    top_tokens: Int32
    top_logprobs: Float32


class StepResult(msgspec.Struct, kw_only=True):
    """What a step found.

    Attributes:
        epoch, step: of the plan that it answers.
        tokens: int32 [S] in the order of ``sample_rows``; -1 where a beam row sampled nothing.
        bad: int32 indices into sample_rows whose logits were not finite (the request ends with an error).
        logprobs: for sampling rows that asked, and for beam rows. prompt_logprobs: for computed prompt positions.
        seconds: time of the computation. swap_seconds: time of swapping, 0 when nothing was swapped
            or when it is still under way beside the next step.
        checksum: of the device tables in debug mode, else 0.
    """

    epoch: int
    step: int
    tokens: Int32 = msgspec.field(default_factory=_empty)
    bad: Int32 = msgspec.field(default_factory=_empty)
    logprobs: list[RowLogprobs] = []
    prompt_logprobs: list[RowLogprobs] = []
    seconds: float = 0.0
    swap_seconds: float = 0.0
    checksum: int = 0


class GroupInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a started worker group tells the engine; measured values live here and are never written into a config.

    Attributes:
        num_blocks: device blocks that a plan may name, 0 .. num_blocks - 1 (scratch blocks of a worker lie beyond).
        num_host_blocks: host blocks for swapping. block_bytes: of one block, all layers, K and V.
        block_size, max_model_len (fitted), max_num_seqs (rows), max_num_batched_tokens.
        vocab_size: ids that may be sampled. device: "cpu" or "cuda".
    """

    num_blocks: int
    num_host_blocks: int
    block_bytes: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    device: str


def _to_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.char, value.shape, value.tobytes())
    raise NotImplementedError(f"cannot encode {type(value)}")


def _from_bytes(kind: Any, value: Any) -> Any:
    char, shape, raw = value
    if char not in "if":
        raise ValueError(f"array of dtype {char!r} does not belong in a plan")
    return np.frombuffer(raw, dtype=char).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_bytes)
_plans = msgspec.msgpack.Decoder(StepPlan, dec_hook=_from_bytes)
_results = msgspec.msgpack.Decoder(StepResult, dec_hook=_from_bytes)


def encode(message: StepPlan | StepResult) -> bytes:
    """The bytes of a plan or a result, for the way between processes."""
    return _encoder.encode(message)


def decode_plan(data: bytes) -> StepPlan:
    """The plan of ``encode``; malformed bytes raise msgspec.ValidationError or ValueError."""
    return _plans.decode(data)


def decode_result(data: bytes) -> StepResult:
    """The result of ``encode``; malformed bytes raise msgspec.ValidationError or ValueError."""
    return _results.decode(data)


def checksum(rows: Int32, lengths: Int32, block_tables: Sequence[Int32]) -> int:
    """CRC-32 of the tables after a step, for debug mode; host and worker must find the same number.

    Both sides compute it over the rows that are live once a plan has been applied *and* its tokens are sampled: every
    row that a plan started and no plan (this one included) has ended. A preempted row has ended.

    Args:
        rows: the live rows, ascending.
        lengths: of each of them: its tokens, those sampled in this step included (a beam row gains one only when
            it is forced).
        block_tables: of each of them: its blocks in order, as many as ``NewRow.blocks`` and ``append_*`` gave it.
    """
    crc = zlib.crc32(np.ascontiguousarray(rows, np.int32).data)
    crc = zlib.crc32(np.ascontiguousarray(lengths, np.int32).data, crc)
    for table in block_tables:
        crc = zlib.crc32(np.ascontiguousarray(table, np.int32).data, crc)
    return crc
