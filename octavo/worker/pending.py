"""DevicePending: a step that was launched on a GPU, until the host knows what it found.

Owns the way of a step's tokens into the host's tables, which happens late: when somebody asks. It does not know how steps are
launched. Invariant: steps settle in their order, and a token lands in the row that it was sampled for, or nowhere.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from octavo.plan import Int32, RowLogprobs, StepPlan, StepResult
from octavo.worker.device import SLOTS
from octavo.worker.staging import NONE
from octavo.worker.tables import Index, Tables


class Device(Protocol):
    """What a pending step needs of the runner that launched it."""

    @property
    def tables(self) -> Tables:
        """The host's tables."""

    def wait(self, slot: int) -> None:
        """Wait for the end of the step that uses a slot."""

    def done(self, slot: int) -> bool:
        """Whether it has ended."""

    def tokens(self, slot: int, num: int) -> Int32:
        """What it sampled."""


class DevicePending:
    """A step that was launched.

    Attributes:
        slot: its staging, event and results. before: the step launched before it, until that is settled.
        finish, prompts: what assembles logprobs once the device has computed them. swaps: events around moves of blocks.
    """

    def __init__(self, runner: Device, plan: StepPlan, started: float, before: "DevicePending | None") -> None:
        self._runner, self._plan, self._started = runner, plan, started
        self.slot = plan.step % SLOTS
        self.settled = False
        self.before = None if before is None or before.settled else before
        self.error: Exception | None = None
        self.finish: Callable[[Int32], list[RowLogprobs]] | None = None
        self.prompts: Callable[[], list[RowLogprobs]] | None = None
        self.swaps: list[tuple[Any, Any]] = []
        self.checksum = 0
        self.ended = 0.0
        self.beam = np.zeros(0, np.bool_)
        self._rows: Index = np.zeros(0, np.intp)
        self._places = self._drawn = NONE

    def expect(self, rows: Index, tables: Tables) -> None:
        """Note where the tokens of the sampling ``rows`` will go in the host's tables."""
        self._rows, self.beam = rows, tables.beam[rows]
        self._places = tables.length[rows]

    def done(self) -> bool:
        """Whether ``result`` would answer at once."""
        return self.settled or self._runner.done(self.slot)

    def settle(self) -> None:
        """Wait for the device and put the tokens into the host's tables, where their rows are still the same."""
        if self.settled:
            return
        if self.before is not None:
            self.before.settle()
        self._runner.wait(self.slot)
        self.ended = time.perf_counter()
        tables, plan = self._runner.tables, self._plan
        self._drawn = self._runner.tokens(self.slot, len(self._rows))
        rows, places, tokens = self._rows, self._places, np.maximum(self._drawn, 0)
        same = (tables.generation.take(rows) == plan.sample_generations[: len(rows)]) & ~self.beam
        if not same.all():
            rows, places, tokens = rows[same], places[same], tokens[same]
        tables.tokens[rows, places] = tokens
        self.settled = True

    def result(self) -> StepResult:
        """Wait for the step; raises what went wrong in it."""
        before = self.before
        self.settle()
        if self.error is not None:
            raise self.error
        begun = self._started if before is None else max(self._started, before.ended)
        self.before = None
        drawn = self._drawn
        return StepResult(
            epoch=self._plan.epoch, step=self._plan.step,
            tokens=np.where(self.beam, np.int32(-1), drawn) if self.beam.any() else drawn,
            bad=(drawn < 0).nonzero()[0].astype(np.int32),
            logprobs=self.finish(drawn) if self.finish is not None else [],
            prompt_logprobs=self.prompts() if self.prompts is not None else [],
            seconds=self.ended - begun if self._plan.rows.size else 0.0,
            swap_seconds=self._swap_seconds(),
            checksum=self.checksum,
        )

    def _swap_seconds(self) -> float:
        """Time of the moves over the bus, which run beside the step; 0 while one of them is under way."""
        if not all(end.query() for _, end in self.swaps):
            return 0.0
        return float(sum(begin.elapsed_time(end) for begin, end in self.swaps)) / 1000
