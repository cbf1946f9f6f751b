"""RowTable: the host's mirror of the rows, as numpy arrays; what makes the cost of a decode step independent of Python.

Owns tokens, lengths, block tables and the numbers that decide when a row needs a block, publishes one or ends; it does not
know requests, policies or the pool. One index per row:

    0 ...... written ...... computed ...... known ...... length ...... limit
    | KV of completed steps |               |            |             |
    | KV of submitted steps -- computed ----|            |             |
    | tokens that the host has seen --------- known -----|             |
    | and tokens that a submitted step will sample -- length ----------|

Invariant: written <= computed <= length, known <= length <= limit, and a row's blocks cover its computed tokens. A row that
decodes has length == computed + 1. A (row, generation) pair names one owner for ever.
"""

import numpy as np
import numpy.typing as npt

from octavo.plan import Int32

Index = npt.NDArray[np.intp]

FREE, PREFILL, DECODE, HOST, DRAIN = range(5)
"""States: no owner; tokens to compute beyond one; one token to compute; the same, but it waits for the host each step;
every token is scheduled and the results are awaited."""

STOP_COLUMNS = 4
NEVER = np.int32(2**31 - 1)


class RowTable:
    """Rows as struct-of-arrays.

    Args:
        num_rows: sequences that may run at once. max_model_len: most tokens of a row. block_size: tokens of a block.

    Attributes:
        tokens: int32 [rows, max_model_len + 1]. blocks: int32 [rows, max_blocks], the block tables.
        length, known, computed, written, num_prompt, limit, num_blocks, capacity (num_blocks in tokens),
            next_publish (tokens at which the next block is full), generation: int32 [rows].
        stops: int32 [STOP_COLUMNS, rows], ids that end the row, -1 where there are fewer.
        state: int8 [rows]. streams, many_stops (more ids than columns), beams: bool [rows].
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self.num_rows, self.block_size = num_rows, block_size
        # np.empty: pages of a row that never runs, or never grows long, are never touched
        self.tokens = np.empty((num_rows, max_model_len + 1), np.int32)
        self.blocks = np.empty((num_rows, -(-(max_model_len + 1) // block_size)), np.int32)
        self.length, self.known, self.computed, self.written, self.num_prompt, self.limit, self.num_blocks, self.capacity, \
            self.next_publish, self.generation = (np.zeros(num_rows, np.int32) for _ in range(10))
        self.stops = np.full((STOP_COLUMNS, num_rows), -1, np.int32)
        self.state = np.zeros(num_rows, np.int8)
        self.streams, self.many_stops, self.beams = (np.zeros(num_rows, np.bool_) for _ in range(3))
        self.num_many_stops = 0

    def place(
        self, row: int, tokens: Int32, num_prompt: int, computed: int, blocks: list[int], limit: int, next_publish: int,
    ) -> None:
        """Give a free row to a sequence whose first ``computed`` tokens have their KV in ``blocks``."""
        assert self.state[row] == FREE, f"row {row} has an owner"
        count, size = len(blocks), self.block_size
        self.tokens[row, : len(tokens)] = tokens
        self.blocks[row, :count] = blocks
        self.length[row] = self.known[row] = len(tokens)
        self.computed[row] = self.written[row] = computed
        self.num_prompt[row], self.limit[row] = num_prompt, limit
        self.num_blocks[row], self.capacity[row] = count, count * size
        self.next_publish[row] = next_publish
        self.state[row] = PREFILL

    def set_kind(self, row: int, ids: tuple[int, ...], *, streams: bool, beam: bool) -> None:
        """Ids that end the row, whether it streams, whether it is a beam. Ids beyond the columns the caller compares."""
        self.stops[:, row] = -1
        kept = ids[:STOP_COLUMNS]
        self.stops[: len(kept), row] = kept
        many = len(ids) > STOP_COLUMNS
        self.num_many_stops += int(many) - int(self.many_stops[row])
        self.many_stops[row], self.streams[row], self.beams[row] = many, streams, beam

    def clear(self, row: int) -> list[int]:
        """Take the row from its owner; returns the blocks it held. The generation moves on."""
        held: list[int] = self.blocks[row, : self.num_blocks[row]].tolist()
        self.state[row] = FREE
        self.generation[row] += 1
        self.num_many_stops -= int(self.many_stops[row])
        self.many_stops[row] = self.streams[row] = self.beams[row] = False
        self.length[row] = self.known[row] = self.computed[row] = self.written[row] = 0
        self.num_blocks[row] = self.capacity[row] = 0
        return held

    def table(self, row: int) -> Int32:
        """A copy of the row's block table."""
        copy: Int32 = self.blocks[row, : self.num_blocks[row]].copy()
        return copy

    def known_tokens(self, row: int) -> Int32:
        """A copy of the tokens that the host has seen."""
        copy: Int32 = self.tokens[row, : self.known[row]].copy()
        return copy

    def output(self, row: int) -> list[int]:
        """What the row has generated so far, as far as the host has seen it."""
        ids: list[int] = self.tokens[row, self.num_prompt[row] : self.known[row]].tolist()
        return ids

    def set_block(self, row: int, index: int, block: int) -> None:
        """Put ``block`` at ``index`` of the table, at its end or in place of another."""
        self.blocks[row, index] = block
        if index >= self.num_blocks[row]:
            self.num_blocks[row] = index + 1
            self.capacity[row] = (index + 1) * self.block_size

    def in_state(self, state: int) -> Index:
        """Rows in a state, ascending."""
        return np.flatnonzero(self.state == state)

    def check(self) -> None:
        """Prove the invariants of every row."""
        for row in np.flatnonzero(self.state != FREE).tolist():
            written, computed, length = int(self.written[row]), int(self.computed[row]), int(self.length[row])
            known, capacity = int(self.known[row]), int(self.capacity[row])
            assert 0 <= written <= computed <= length, f"row {row}: written {written}, computed {computed}, length {length}"
            assert known <= length <= self.limit[row], f"row {row}: known {known}, length {length}, {self.limit[row]}"
            assert computed <= capacity == self.num_blocks[row] * self.block_size, f"row {row}: {computed} in {capacity}"
            if self.state[row] == DECODE:
                assert length == computed + 1, f"row {row} decodes with {computed} of {length} computed"
