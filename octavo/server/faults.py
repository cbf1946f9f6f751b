"""Faults on purpose, for tests: a group of workers that fails, hangs or dawdles at the steps that it was told.

Owns the words for faults and what they do; no option or environment variable leads here, only the engine process's start
message (``Supervisor._faults``, set by tests). Invariant: what a fault does not touch is computed as without it.

A list of faults is written ``name:arguments``, with semicolons between:
``step_raise:5`` (the fifth step raises; ``5-7`` are three), ``nan_row:5:2`` (the third sampled row of the fifth step has no
finite logits), ``slow_step:0.05`` (seconds, every step), ``hang:3:60`` (the third step takes 60 s), ``device_lost:3`` (the
third step finds the device's context lost), ``no_memory:3`` (the third step finds too little memory), ``init_raise:1`` (the
workers do not start), ``init_hang:60`` (they start 60 s late).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from octavo.engine.engine import Group, Pending
from octavo.errors import ConfigError, DeviceLost
from octavo.params import LogitsProcessor
from octavo.plan import Constraint, GroupInfo, StepPlan, StepResult

ARGUMENTS = {"step_raise": 1, "nan_row": 2, "slow_step": 1, "hang": 2, "device_lost": 1, "no_memory": 1, "init_raise": 1,
             "init_hang": 1}


class Broken(RuntimeError):
    """What an injected failure raises."""


class FaultyPending:
    """A submitted step whose result is spoilt."""

    def __init__(self, pending: Pending, spoil: Callable[[StepResult], StepResult]) -> None:
        self._pending, self._spoil = pending, spoil

    def done(self) -> bool:
        """True when ``result`` would not wait."""
        return self._pending.done()

    def result(self) -> StepResult:
        """The step's result with its fault; a step that fails has been computed all the same, as the workers promise."""
        return self._spoil(self._pending.result())


class FaultyGroup:
    """A group around a group.

    Args:
        group: does the work. faults: see the top of this file; ConfigError for what is none.
    """

    def __init__(self, group: Group, faults: str) -> None:
        self._group, self._faults, self._step = group, parse(faults), 0
        for name, given in self._faults:
            if name == "init_raise":
                raise Broken("the workers do not start.")
            if name == "init_hang":
                time.sleep(float(given[0]))

    @property
    def info(self) -> GroupInfo:
        """Of the group inside."""
        return self._group.info

    @property
    def asynchronous(self) -> bool:
        """Of the group inside."""
        return self._group.asynchronous

    def submit(self, plan: StepPlan) -> Pending:
        """Submit the plan, with the faults that are due; steps are counted from 1."""
        self._step += 1
        for name, given in self._faults:
            if name == "slow_step":
                time.sleep(float(given[0]))
            elif name == "hang" and int(given[0]) == self._step:
                time.sleep(float(given[1]))
        return FaultyPending(self._group.submit(plan), self._spoiler(self._step))

    def set_processors(self, row: int, generation: int, processors: Sequence[LogitsProcessor],
                       constraint: Constraint | None) -> None:
        """Of the group inside."""
        self._group.set_processors(row, generation, processors, constraint)

    def close(self) -> None:
        """Of the group inside."""
        self._group.close()

    def __getattr__(self, name: str) -> Any:
        """What a protocol gains later goes straight to the group inside."""
        return getattr(self._group, name)

    def _spoiler(self, step: int) -> Callable[[StepResult], StepResult]:
        def spoil(result: StepResult) -> StepResult:
            for name, given in self._faults:
                first, _, last = given[0].partition("-")
                if name == "step_raise" and int(first) <= step <= int(last or first):
                    raise Broken(f"step {step} fails.")
                if name == "device_lost" and int(first) == step:
                    raise DeviceLost("the device's context is lost.")
                if name == "no_memory" and int(first) == step:
                    raise torch.OutOfMemoryError("the device has no memory left.")
                if name == "nan_row" and int(first) == step and int(given[1]) < len(result.tokens):
                    result.bad = np.union1d(result.bad, [int(given[1])]).astype(np.int32)
            return result
        return spoil


def parse(faults: str) -> list[tuple[str, list[str]]]:
    """Names and arguments; ConfigError for a fault that does not exist."""
    found = []
    for part in filter(None, faults.split(";")):
        name, *given = part.split(":")
        if len(given) != ARGUMENTS.get(name):
            raise ConfigError(f"unknown fault {part!r}.", "faults")
        found.append((name, given))
    return found
