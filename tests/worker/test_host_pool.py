"""Host memory is pinned in pieces that meet at borders of pages, and given back whatever happened meanwhile.

The driver is a fake that knows what the real one demands: it pins whole pages, none of them twice.
"""

import math
import threading
import time

import pytest
import torch

from octavo.errors import ConfigError
from octavo.worker import host_pool
from octavo.worker.host_pool import PAGE, HostPool


class Refusal:
    """What the driver returns: a number that is 0 for success, and words."""

    def __init__(self, code):
        self.code = code

    def __int__(self):
        return self.code

    def __str__(self):
        return f"refusal {self.code}"


class Clock:
    """Stands still unless a test moves it on, so that a machine that is slow changes nothing."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Driver:
    """Registered pieces by their start, and all that ever were; refuses from the n-th piece on."""

    def __init__(self):
        self.pieces, self.pages, self.seen, self.accepts = {}, set(), [], math.inf
        self.asked, self.clock, self.takes = False, Clock(), 0.0
        self.gate, self.began = threading.Event(), threading.Event()
        self.gate.set()

    def cudaHostRegister(self, start, size, flags):
        self.asked = True
        assert self.gate.wait(10)
        self.clock.now += self.takes
        if len(self.seen) >= self.accepts:
            return Refusal(2)
        pages = set(range(start // PAGE, -(-(start + size) // PAGE)))
        assert size > 0 and not pages & self.pages, "a page is pinned twice"
        self.pieces[start] = size
        self.pages |= pages
        self.seen.append((start, start + size))
        self.began.set()
        return Refusal(0)

    def cudaHostUnregister(self, start):
        size = self.pieces.pop(start)
        self.pages -= set(range(start // PAGE, -(-(start + size) // PAGE)))


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(host_pool, "PIECE", 4 * PAGE)
    monkeypatch.setattr(host_pool, "PAUSE", 0.001)
    monkeypatch.setattr(host_pool, "QUIET", 0.001)
    return driver


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(host_pool, "time", clock)
    return clock


def started(*shape, dtype=torch.uint8):
    pool = HostPool(shape, dtype)
    pool.start()
    return pool


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("size", [1, 100, PAGE, 4 * PAGE - 1, 4 * PAGE, 5 * PAGE + 1, 8 * PAGE, 40 * PAGE + 24, 10**6])
def test_all_of_it_is_pinned_once(driver, size):
    pool = HostPool((size,), torch.uint8)
    tensor = pool.wait()
    start, end = tensor.data_ptr(), tensor.data_ptr() + size
    assert driver.seen[0][0] == start and driver.seen[-1][1] == end
    borders = [stop for _, stop in driver.seen[:-1]]
    assert borders == [begin for begin, _ in driver.seen[1:]] and all(border % PAGE == 0 for border in borders)
    assert all(stop - begin <= 5 * PAGE for begin, stop in driver.seen)
    assert not tensor.any()  # every page was made before it was pinned
    pool.close()
    assert not driver.pieces and not driver.pages


def test_it_is_a_tensor_of_the_shape_asked_for(driver):
    pool = HostPool((2, 3, 5, 7), torch.bfloat16)
    assert pool.wait().shape == (2, 3, 5, 7) and pool.wait().dtype == torch.bfloat16
    pool.close()


def test_nothing_is_pinned_for_nothing(driver):
    pool = HostPool((3, 0, 8), torch.float32)
    assert pool.ready and pool.wait().numel() == 0 and driver.seen == []
    pool.close()


def test_nobody_gets_it_before_all_of_it_is_pinned(driver):
    driver.gate.clear()
    pool = started(20 * PAGE)
    got = []
    waiting = threading.Thread(target=lambda: got.append(len(driver.pieces) if pool.wait() is pool.tensor else None))
    waiting.start()
    assert got == [] and not pool.ready
    driver.gate.set()
    waiting.join(10)
    assert pool.ready
    assert got == [len(driver.seen)] and len(driver.seen) >= 5
    pool.close()


def test_nothing_is_pinned_before_the_start_or_while_steps_are_launched(driver, clock, monkeypatch):
    monkeypatch.setattr(host_pool, "QUIET", 0.02)
    pool = HostPool((40 * PAGE,), torch.uint8)
    clock.now += 1.0
    time.sleep(0.05)
    assert driver.seen == [] and not pool.ready
    pool.start()
    for _ in range(10):
        clock.now += 0.019
        pool.stepped()
        time.sleep(0.01)
    assert driver.seen == [], "it was pinned between two steps though nobody needs it yet"
    clock.now += 0.021  # no step for a while: all of it, without pauses
    until(lambda: pool.ready)
    assert len(driver.seen) >= 10
    pool.close()


def test_blocks_that_are_expected_are_pinned_between_steps_with_pauses(driver, clock, monkeypatch):
    monkeypatch.setattr(host_pool, "QUIET", 60.0)
    monkeypatch.setattr(host_pool, "PAUSE", 0.05)
    pool = started(40 * PAGE)
    pool.expect()

    def some() -> bool:
        clock.now += 0.01
        assert len(driver.seen) <= clock.now / 0.05
        return len(driver.seen) >= 4

    until(some)
    assert not pool.ready
    pool.expect()
    pool.wait()
    assert pool.ready
    pool.close()


def test_a_piece_that_took_long_makes_a_longer_pause(driver, clock, monkeypatch):
    monkeypatch.setattr(host_pool, "QUIET", 60.0)
    driver.clock, driver.takes = clock, 0.01
    pool = started(40 * PAGE)
    pool.expect()

    def seen(number: int, step: float) -> bool:
        clock.now += step
        return len(driver.seen) >= number

    until(lambda: seen(1, 0.001))
    for _ in range(20):
        assert not seen(2, 0.025)  # 0.5 s of the 0.6 that the first one is worth
        time.sleep(0.002)
    until(lambda: seen(2, 0.025))
    pool.close()


@pytest.mark.parametrize("begun", [False, True])
def test_there_are_no_pauses_for_somebody_who_waits(driver, monkeypatch, begun):
    monkeypatch.setattr(host_pool, "QUIET", 60.0)
    monkeypatch.setattr(host_pool, "PAUSE", 60.0)
    pool = started(40 * PAGE) if begun else HostPool((40 * PAGE,), torch.uint8)
    if begun:
        pool.expect()
    pool.wait()
    assert len(driver.seen) >= 10
    pool.close()


def test_close_ends_the_pinning_and_gives_back_what_was_pinned(driver, monkeypatch):
    driver.gate.clear()
    pool = started(40 * PAGE)
    until(lambda: driver.asked)
    monkeypatch.setattr(host_pool, "QUIET", 60.0)
    pool.stepped()
    driver.gate.set()
    assert driver.began.wait(10)
    pool.close()
    assert not driver.pieces and len(driver.seen) == 1 and not pool.ready
    pool.close()


def test_a_pool_that_was_never_started_can_be_closed(driver):
    pool = HostPool((40 * PAGE,), torch.uint8)
    pool.close()
    assert driver.seen == []


@pytest.mark.parametrize("accepts", [0, 3])
def test_a_refusal_is_an_error_with_the_size_and_the_reason(driver, accepts):
    driver.accepts = accepts
    pool = HostPool((20 * PAGE,), torch.uint8)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"swap_space: {20 * PAGE} bytes .* could not be pinned: refusal 2\.") as caught:
            pool.wait()
        assert caught.value.param == "swap_space"
    assert len(driver.pieces) == accepts and not pool.ready
    pool.close()
    assert not driver.pieces


def test_a_driver_that_breaks_is_an_error_too(monkeypatch, driver):
    def broken():
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(torch.cuda, "cudart", broken)
    pool = HostPool((20 * PAGE,), torch.uint8)
    with pytest.raises(ConfigError, match="could not be pinned: the driver is gone"):
        pool.wait()


def test_an_error_without_words_is_an_error_too(monkeypatch, driver):
    def broken():
        raise MemoryError

    monkeypatch.setattr(torch.cuda, "cudart", broken)
    pool = HostPool((20 * PAGE,), torch.uint8)
    with pytest.raises(ConfigError, match="could not be pinned: MemoryError"):
        pool.wait()


def test_nobody_gets_it_when_it_is_closed(driver, monkeypatch):
    monkeypatch.setattr(host_pool, "QUIET", 60.0)
    for pool in (HostPool((20 * PAGE,), torch.uint8), started(20 * PAGE)):
        pool.close()
        with pytest.raises(ConfigError, match="could not be pinned: the pool is closed"):
            pool.wait()
    assert driver.seen == []


def test_it_may_be_made_where_no_gradients_are_kept(driver):
    with torch.inference_mode():
        pool = HostPool((20 * PAGE,), torch.uint8)
        assert not pool.wait().any()
    pool.close()
