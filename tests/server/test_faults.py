"""Injected faults over the fake engine: each does what it says, to whom it says."""

import time

import pytest
from fakes import Bench

from octavo.errors import ConfigError, DeviceLost, EngineDead
from octavo.server.faults import Broken, FaultyGroup, parse


def bench(faults: str) -> Bench:
    made = Bench(blocks=64, rows=8)
    made.engine._group = FaultyGroup(made.group, faults)
    return made


def test_a_step_that_raises_ends_its_requests_only() -> None:
    b = bench("step_raise:3")
    b.add("a", [3, 4], max_tokens=6)
    for _ in range(3):
        b.step()
    b.add("b", [3, 4], max_tokens=6)
    b.faults = True
    b.run()
    assert b.ends["a", 0].reason == "error" and "Broken" in b.ends["a", 0].error
    assert b.ends["b", 0].reason != "error"
    b.assert_reference()


def test_three_in_a_row_end_the_engine() -> None:
    b = bench("step_raise:1-3")
    for name in "abc":
        b.add(name, [3, 4])
        if name == "c":
            with pytest.raises(EngineDead):
                b.step()
        else:
            b.step()


def test_a_row_without_finite_logits_ends_its_request_only() -> None:
    b = bench("nan_row:2:1")
    for name in "abc":
        b.add(name, [3, ord(name) % 40], max_tokens=6, eos=())
    b.faults = True
    b.run()
    assert [b.ends[name, 0].reason for name in "abc"] == ["length", "error", "length"]
    b.assert_reference()


def test_a_lost_device_is_told_from_a_failed_step() -> None:
    b = bench("device_lost:2")
    b.add("a", [3, 4], max_tokens=6)
    b.step()
    with pytest.raises(DeviceLost):
        b.step()


def test_steps_take_their_time() -> None:
    b = bench("slow_step:0.01;hang:2:0.1")
    b.add("a", [3, 4], max_tokens=3, eos=())
    begun = time.monotonic()
    b.run()
    assert time.monotonic() - begun >= 0.13


def test_workers_that_do_not_start() -> None:
    with pytest.raises(Broken):
        bench("init_raise:1")


@pytest.mark.parametrize("faults", ["what:1", "hang:1", "step_raise", "step_raise:1:2"])
def test_unknown_faults_are_refused(faults: str) -> None:
    with pytest.raises(ConfigError, match="unknown fault"):
        parse(faults)
