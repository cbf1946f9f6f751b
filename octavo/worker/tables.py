"""Tables: one row per running sequence, as arrays; the only state that a worker keeps between steps besides KV.

Owns tokens, lengths, block tables and sampling parameters of the rows and applies the changes that a plan carries; it
does not know requests, KV contents or logits. Per-row Python runs for ``plan.new`` only, everything else is vectorised.

    row r:   0 ......... computed[r] ......... length[r] ......... max_model_len
             |  KV in blocks  |  known tokens, no KV yet  |   nothing yet   |

Invariant: computed <= length, the blocks of a row cover what is computed, and a row without an owner has generation -1.
A plan that does not fit (its epoch, step, rows, starts, generations) is a RuntimeError that says the values: the host
and this device have parted, and nothing computed from here on could be trusted.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.plan import NewRow, StepPlan, checksum

Index = npt.NDArray[np.intp]
NO_OWNER = -1


class Tables:
    """Rows of one device. Arrays are numpy views of CPU tensors and share their memory.

    Args:
        num_rows: sequences that may run at once. max_model_len: most tokens of a row.
        block_size: tokens of a KV block. num_blocks: ids that a plan may name are 0 .. num_blocks - 1.

    Attributes:
        block_tables: the int32 tensor [rows, max_blocks] that attention kernels read; ``blocks`` is its view.
        tokens: int32 [rows, max_model_len + 1], one column more than a row may compute: the last token of a full row
            is sampled and never fed back. length, computed, num_prompt, generation, num_blocks: int32 [rows].
        temperature, top_p, min_p, presence, frequency, repetition: float32 [rows]; top_k, index, logprobs,
            prompt_logprobs, min_tokens: int32 [rows]; seed: int64 [rows], bit pattern of the uint64; beam: bool [rows].
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int, num_blocks: int) -> None:
        self.num_rows, self.max_model_len = num_rows, max_model_len
        self.block_size, self.pool_blocks = block_size, num_blocks
        self.epoch: int | None = None
        self.step = 0
        # torch.empty: pages of a row that never runs, or never grows long, are never touched
        self.token_table = torch.empty((num_rows, max_model_len + 1), dtype=torch.int32)
        self.block_tables = torch.empty((num_rows, -(-max_model_len // block_size)), dtype=torch.int32)
        self.tokens = self.token_table.numpy()
        self.blocks = self.block_tables.numpy()
        self.length, self.computed, self.num_prompt, self.num_blocks = (np.zeros(num_rows, np.int32) for _ in range(4))
        self.generation = np.full(num_rows, NO_OWNER, np.int32)
        self.temperature, self.min_p, self.presence, self.frequency = (np.zeros(num_rows, np.float32) for _ in range(4))
        self.top_p, self.repetition = np.ones(num_rows, np.float32), np.ones(num_rows, np.float32)
        self.top_k, self.index, self.min_tokens = (np.zeros(num_rows, np.int32) for _ in range(3))
        self.logprobs, self.prompt_logprobs = np.full(num_rows, -1, np.int32), np.full(num_rows, -1, np.int32)
        self.seed = np.zeros(num_rows, np.int64)
        self.beam = np.zeros(num_rows, np.bool_)
        self._seed_bits = self.seed.view(np.uint64)

    def apply(self, plan: StepPlan) -> None:
        """Apply the changes of ``plan``: ended, new, append, forced. Nothing is computed yet.

        Raises:
            RuntimeError: the plan is not the next one (then nothing was applied), or a change contradicts the tables.
        """
        self._check_identity(plan)
        self.step += 1
        if plan.ended.size:
            self._end(plan.ended)
        for new in plan.new:
            self._start(new)
        if plan.append_rows.size:
            self._append(plan)
        if plan.forced_rows.size:
            self._force(plan)

    def check(self, plan: StepPlan) -> None:
        """Prove that the work of an applied plan fits the rows.

        Raises:
            RuntimeError: names the first row that does not fit, with the values of host and device.
        """
        rows = plan.rows.astype(np.intp)
        computed = self.computed.take(rows)
        ends = computed + plan.counts
        good = (self.generation.take(rows) != NO_OWNER) & (computed == plan.starts) & (plan.counts >= 1)
        good &= (ends <= np.minimum(self.length.take(rows), self.max_model_len)) & (
            ends <= self.num_blocks.take(rows) * self.block_size
        )
        if not good.all() or self._repeats(rows):
            self._fail_rows(plan, good)
        if plan.sample_rows.size:
            self._check_sampling(plan, ends)

    def advance(self, plan: StepPlan) -> None:
        """Note that the KV of the plan's tokens is written; called once the whole step has succeeded."""
        self.computed[plan.rows] += plan.counts

    def write(self, rows: Index, tokens: npt.NDArray[np.int32]) -> None:
        """Append one sampled token to each of ``rows``, each row at most once."""
        self.tokens[rows, self.length[rows]] = tokens
        self.length[rows] += 1

    def output(self, row: int) -> npt.NDArray[np.int32]:
        """A view of what the row has generated so far."""
        view: npt.NDArray[np.int32] = self.tokens[row, self.num_prompt[row] : self.length[row]]
        return view

    def active(self) -> Index:
        """Rows that have an owner, ascending."""
        return np.flatnonzero(self.generation != NO_OWNER)

    def checksum(self) -> int:
        """``plan.checksum`` of the rows as they stand."""
        rows = self.active()
        tables = [self.blocks[row, : self.num_blocks[row]] for row in rows]
        return checksum(rows.astype(np.int32), self.length[rows], tables)

    def _check_identity(self, plan: StepPlan) -> None:
        if self.epoch is None and plan.step == 0:
            self.epoch = plan.epoch
        if plan.epoch != self.epoch or plan.step != self.step:
            wanted = "any epoch" if self.epoch is None else f"epoch {self.epoch}"
            raise RuntimeError(
                f"plan of epoch {plan.epoch}, step {plan.step} arrived where {wanted}, step {self.step} is due: "
                "a plan was lost or came twice."
            )

    def _end(self, ended: npt.NDArray[np.int32]) -> None:
        idle = self.generation[ended] == NO_OWNER
        if idle.any():
            raise RuntimeError(f"step {self.step - 1} ends row {ended[idle][0]}, which has no owner.")
        self.generation[ended] = NO_OWNER

    def _start(self, new: NewRow) -> None:
        row, known, blocks = new.row, len(new.tokens), len(new.blocks)
        if not 0 <= row < self.num_rows or self.generation[row] != NO_OWNER or new.generation < 0:
            owner = self.generation[row] if 0 <= row < self.num_rows else "none"
            raise RuntimeError(
                f"row {row} of {self.num_rows} cannot start with generation {new.generation}: its owner is {owner}."
            )
        if not 0 <= new.start <= known <= self.max_model_len or not 0 < new.num_prompt <= known:
            raise RuntimeError(
                f"row {row} cannot start with {known} tokens, {new.num_prompt} of them prompt, and "
                f"{new.start} computed; max_model_len is {self.max_model_len}."
            )
        if blocks > self.blocks.shape[1] or new.start > blocks * self.block_size:
            raise RuntimeError(
                f"row {row} cannot start with {blocks} blocks of {self.block_size} for {new.start} tokens; "
                f"a row has at most {self.blocks.shape[1]}."
            )
        self._check_ids(new.blocks)
        self.tokens[row, :known] = new.tokens
        self.blocks[row, :blocks] = new.blocks
        self.generation[row], self.num_blocks[row] = new.generation, blocks
        self.length[row], self.computed[row], self.num_prompt[row] = known, new.start, new.num_prompt
        s = new.sampling
        self.temperature[row], self.top_k[row], self.top_p[row], self.min_p[row] = (
            s.temperature,
            s.top_k,
            s.top_p,
            s.min_p,
        )
        self.presence[row], self.frequency[row], self.repetition[row] = s.presence, s.frequency, s.repetition
        self._seed_bits[row], self.index[row], self.beam[row] = s.seed, s.index, s.beam
        self.logprobs[row], self.prompt_logprobs[row] = s.logprobs, s.prompt_logprobs
        self.min_tokens[row] = s.min_tokens if s.stop_ids else 0

    def _append(self, plan: StepPlan) -> None:
        rows, index = plan.append_rows, plan.append_index
        self._check_ids(plan.append_blocks)
        self._check_owned(rows, "append a block to")
        if index.min() < 0 or index.max() >= self.blocks.shape[1]:
            raise RuntimeError(f"block index {index.max()} of an append is outside a table of {self.blocks.shape[1]}.")
        self.blocks[rows, index] = plan.append_blocks
        np.maximum.at(self.num_blocks, rows, index + 1)

    def _force(self, plan: StepPlan) -> None:
        rows = plan.forced_rows
        self._check_owned(rows, "force a token into")
        # The k-th token of a row goes k places behind its length; after a stable sort, k is the distance to its first.
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        place = self.length[ordered] + np.arange(len(rows)) - np.searchsorted(ordered, ordered)
        if place.max() >= self.tokens.shape[1]:
            raise RuntimeError(
                f"row {ordered[place.argmax()]} has no place for a forced token: max_model_len is {self.max_model_len}."
            )
        self.tokens[ordered, place] = plan.forced_tokens[order]
        np.add.at(self.length, rows, 1)

    def _check_ids(self, blocks: npt.NDArray[np.int32]) -> None:
        if len(blocks) and blocks.view(np.uint32).max() >= self.pool_blocks:  # a negative id is a large one
            raise RuntimeError(f"blocks {blocks.min()} to {blocks.max()} are outside a pool of {self.pool_blocks}.")

    def _check_owned(self, rows: npt.NDArray[np.int32], what: str) -> None:
        idle = self.generation[rows] == NO_OWNER
        if idle.any():
            raise RuntimeError(f"step {self.step - 1} wants to {what} row {rows[idle][0]}, which has no owner.")

    def _check_sampling(self, plan: StepPlan, ends: npt.NDArray[np.int32]) -> None:
        rows = plan.sample_rows.astype(np.intp)
        source = ends.take(plan.sample_from)
        good = (self.generation.take(rows) == plan.sample_generations) & (plan.sample_generations != NO_OWNER)
        good &= (self.length.take(rows) == plan.sample_pos) & (source == plan.sample_pos)
        if not good.all() or plan.sample_pos.max() > self.max_model_len:
            i = int(np.argmin(good))
            raise RuntimeError(
                f"row {rows[i]} cannot sample at step {plan.step}: the plan says generation "
                f"{plan.sample_generations[i]} and position {plan.sample_pos[i]}, the device has generation "
                f"{self.generation[rows[i]]} and length {self.length[rows[i]]}, its logits stand at {source[i]}, "
                f"max_model_len is {self.max_model_len}."
            )
        if plan.sample_rows is not plan.rows and self._repeats(rows):
            raise RuntimeError(f"step {plan.step} samples a row twice: {plan.sample_rows.tolist()}.")

    def _repeats(self, rows: Index) -> bool:
        mark = np.zeros(self.num_rows, np.bool_)
        mark[rows] = True
        return int(np.count_nonzero(mark)) != len(rows)

    def _fail_rows(self, plan: StepPlan, good: npt.NDArray[np.bool_]) -> None:
        if good.all():
            raise RuntimeError(f"step {plan.step} computes a row twice: {plan.rows.tolist()}.")
        i = int(np.argmin(good))
        row = int(plan.rows[i])
        raise RuntimeError(
            f"row {row} cannot compute {plan.counts[i]} tokens from {plan.starts[i]} at step {plan.step}: the device "
            f"has generation {self.generation[row]}, {self.computed[row]} computed of {self.length[row]} known tokens, "
            f"{self.num_blocks[row]} blocks of {self.block_size}."
        )

    def describe(self, row: int) -> dict[str, Any]:
        """One row as plain values, for error reports and tests."""
        return {
            "generation": int(self.generation[row]),
            "tokens": self.tokens[row, : self.length[row]].tolist(),
            "computed": int(self.computed[row]),
            "num_prompt": int(self.num_prompt[row]),
            "blocks": self.blocks[row, : self.num_blocks[row]].tolist(),
        }
