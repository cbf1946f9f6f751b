"""Device rows: what a GPU keeps of every row, and the buffers that a step reads and writes at fixed addresses.

Owns the tensors and the way of a packed plan to the GPU; it does not know models or what is captured. Invariant: two arrays
of staging are never filled while a copy of one of them may still be under way, because a step's result is awaited before the
step after the next is packed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo import ops
from octavo.ops.attention import AttentionMeta
from octavo.plan import Int32
from octavo.worker.attention_sizes import AttentionSizes
from octavo.worker.gpu import Gpu
from octavo.worker.staging import PARAMETERS, capacity

SLOTS = 4  # steps whose staging and results may be in use at once


class DeviceRows:
    """Rows and step buffers of one GPU.

    Args:
        num_rows, num_tokens: most of a step. max_blocks: of a row. block_size: tokens of a block.
        attention: sizes of attention's lists and partial results. vocab_size: of the logits. gpu: where.

    Attributes:
        results: pinned int32 [SLOTS, num_rows], the sampled tokens of the last steps.
        tokens: int32 [num_rows], what sampling writes. sample_*: its parameters, see ``ops.begin_step``.
    """

    def __init__(
        self, num_rows: int, num_tokens: int, max_blocks: int, block_size: int, attention: AttentionSizes, vocab_size: int,
        gpu: Gpu,
    ) -> None:
        device = gpu.name

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def longs(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.num_rows, self.vocab_size, self._block_size = num_rows, vocab_size, block_size
        words = capacity(num_rows, num_tokens)
        self._host = gpu.pinned((SLOTS, words), torch.int32)
        self.staging = [line.numpy() for line in self._host]
        self._staging = ints(words)
        self.block_tables, self._last_token = ints(num_rows, max_blocks), ints(num_rows)
        self._parameters = ints(num_rows, PARAMETERS)
        self._ids, self._positions, self._slots = longs(num_tokens), longs(num_tokens), longs(num_tokens)
        self._rows, self._query_start, self._context_len = ints(num_rows), ints(num_rows + 1), ints(num_rows)
        self.sample_ints, self.sample_seeds = ints(5, num_rows), longs(num_rows)
        self.sample_floats = torch.zeros((3, num_rows), dtype=torch.float32, device=device)
        self._result_slot = ints(1)
        self.tokens = ints(num_rows)
        self.results = gpu.pinned((SLOTS, num_rows), torch.int32)
        self._work = {window: ints(attention.work) for window in attention.windows}
        self._partials = torch.zeros(attention.partials, dtype=torch.float32, device=device)
        self._attention = attention

    def send(self, slot: int, length: int) -> None:
        """Copy the first ``length`` words of an array of staging to the GPU."""
        self._staging[:length].copy_(self._host[slot, :length], non_blocking=True)

    def begin(self, num_tokens: int, num_seqs: int, max_query: int) -> tuple[Tensor, Tensor, AttentionMeta]:
        """Unpack what was sent for a step of these (padded) sizes; ids, positions and what attention needs.

        Args:
            max_query: no sequence computes more tokens.
        """
        ids, positions, slots = self._ids[:num_tokens], self._positions[:num_tokens], self._slots[:num_tokens]
        rows, context_len = self._rows[:num_seqs], self._context_len[:num_seqs]
        query_start = self._query_start[: num_seqs + 1]
        ops.begin_step(
            self._staging, self.block_tables, self._last_token, self._parameters, ids, positions, slots, rows, query_start,
            context_len, self.sample_ints, self.sample_floats, self.sample_seeds, self._result_slot, self._block_size,
        )
        a = self._attention
        if num_tokens:
            for window, work in self._work.items():
                ops.attention_plan(
                    work, query_start, context_len, a.heads, a.kv_heads, a.head_dim, window, max_query, a.max_partials
                )
        work_lists: Mapping[int, Tensor] = self._work
        meta = AttentionMeta(
            self.block_tables, rows, query_start, context_len, slots, max_query, 0, work_lists,
            self._partials if self._work else None,
        )
        return ids, positions, meta

    def draw(self, num: int, logits: Tensor) -> None:
        """Sample the first ``num`` samples from logits float32 [num, vocab] into ``tokens``."""
        temperature, top_p, min_p = self.sample_floats[:, :num].unbind()
        ints = self.sample_ints[:, :num]
        ops.sample(
            self.tokens[:num], logits, temperature, ints[3], top_p, min_p, self.sample_seeds[:num], ints[4], ints[2]
        )

    def end(self, num: int) -> None:
        """Hand the first ``num`` tokens to their rows and to the host."""
        ops.end_step(self.tokens[:num], self.sample_ints[0, :num], self._last_token, self.results, self._result_slot)

    def sources(self, num: int) -> Tensor:
        """int32 [num]: the token whose hidden state each sample reads."""
        return self.sample_ints[1, :num]

    def result(self, slot: int, num: int) -> Int32:
        """What the step of that slot sampled; its event must have passed."""
        copied: Int32 = self.results.numpy()[slot, :num].copy()
        return copied
