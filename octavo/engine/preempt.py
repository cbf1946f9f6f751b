"""Preemption: who gives up its blocks when they run out, and whether its KV is computed again or kept in host memory.

Owns the choice of the victim and of the way, and the measured rates behind it; it does not know plans or budgets.

Invariant: the victim is always the last in the policy's rank among the running (the whole request for beams, which advance
together), so the first one runs to its end.
"""

import math

from octavo.engine.request import Sequence
from octavo.engine.state import EngineState, StepRecord
from octavo.plan import StepResult

PREFILL_TOKENS_PER_SECOND = 2000.0
SWAP_BYTES_PER_SECOND = 4e9
"""Guesses for the first preemption, before anything has been measured."""

SMOOTHING = 0.2
"""Weight of a new measurement in the moving averages."""


class Preemption:
    """Frees blocks by taking running sequences out of their rows.

    Args:
        state: of the engine; changed by ``youngest`` and ``preempt``.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self.prefill_rate = PREFILL_TOKENS_PER_SECOND
        self.swap_rate = SWAP_BYTES_PER_SECOND

    def youngest(self) -> Sequence | None:
        """The running sequence that gives way first; None when nothing runs."""
        rank = self._state.policy.rank
        return max((s for s in self._state.sequences if s is not None), key=rank, default=None)

    def preempt(self, victim: Sequence) -> None:
        """Take ``victim`` (with beams: its whole request) out of its row and queue it at its place in time."""
        if victim.request.beams is None:
            self._preempt(victim)
            return
        for sequence in list(victim.request.sequences):
            if sequence.row >= 0:
                self._park(sequence)
        victim.request.beams.forget_reports()

    def observe(self, record: StepRecord, result: StepResult) -> None:
        """Learn from a step's times: of prompts where it mostly computed prompts and moved nothing, of moves where it did."""
        if record.swapped_bytes:
            if result.swap_seconds > 0:
                self.swap_rate += SMOOTHING * (record.swapped_bytes / result.swap_seconds - self.swap_rate)
        elif record.num_prompt_tokens > 4 * record.num_decodes and result.seconds > 0:
            rate = (record.num_prompt_tokens + record.num_decodes) / result.seconds
            self.prefill_rate += SMOOTHING * (rate - self.prefill_rate)

    def swap_is_cheaper(self, computed: int) -> bool:
        """True when moving the KV of ``computed`` tokens out and back takes less time than computing it again."""
        blocks = math.ceil(computed / self._state.block_size)
        return 2 * blocks * self._state.info.block_bytes / self.swap_rate < computed / self.prefill_rate

    def _preempt(self, victim: Sequence) -> None:
        state, row = self._state, victim.row
        computed = int(state.table.computed[row])
        mode = state.config.preemption_mode
        if mode == "auto":
            mode = "swap" if state.host_ready() and self.swap_is_cheaper(computed) else "recompute"
        blocks: list[int] = state.table.blocks[row, : math.ceil(computed / state.block_size)].tolist()
        # A row that no plan has announced has nothing in its blocks that a swap could keep better than the cache does.
        if mode == "recompute" or not blocks or not victim.announced or len(blocks) > state.host_pool.num_available:
            self._park(victim)
            return
        victim.host_blocks = state.host_pool.take(len(blocks))
        victim.computed = computed
        state.swap_out.extend(zip(blocks, victim.host_blocks, strict=True))
        state.swapping.append(victim)
        state.stats.preempted_swap += 1
        state.park(victim)

    def _park(self, victim: Sequence) -> None:
        self._state.stats.preempted_recompute += 1
        victim.computed = 0
        self._state.park(victim)
