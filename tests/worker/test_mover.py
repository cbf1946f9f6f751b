"""Blocks go through staging in pieces, and arrive; a half of staging is written again only after it has been read."""

import sys
from pathlib import Path

import pytest
import torch

from octavo.errors import ConfigError
from octavo.worker.mover import BlockMover

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))
from pretend import PretendGpu, PretendHostPool, use_references


class Stream:
    """Remembers which events it waited for."""

    def __init__(self, name):
        self.name, self.waited, self.synchronized = name, [], 0

    def wait_event(self, event):
        self.waited.append(event)

    def synchronize(self):
        self.synchronized += 1


class Gpu(PretendGpu):
    def __init__(self):
        self.side = Stream("side")

    def stream(self):
        return self.side


@pytest.fixture
def pools(monkeypatch):
    use_references(monkeypatch)
    shape = (2, 2, 12, 4, 1, 8)
    host = PretendHostPool((2, 2, 20, 4, 1, 8), torch.float32)
    host.tensor.zero_()
    return torch.randn(shape), host


def ints(*pairs):
    return torch.tensor(pairs, dtype=torch.int32)


@pytest.mark.parametrize("staged", [1, 2, 3, 7, 50])
def test_blocks_arrive_and_come_back_elsewhere(pools, staged):
    kv, host = pools
    before = kv.clone()
    mover = BlockMover(kv, host, staged, Gpu(), Stream("steps"))
    out = ints((3, 19), (0, 2), (11, 0), (5, 7), (6, 8), (1, 1), (2, 3))
    moves = mover.out(out)
    assert len(moves) == -(-len(out) // staged)
    for source, target in out.tolist():
        assert torch.equal(host.tensor[:, :, target], before[:, :, source])
    assert not host.tensor[:, :, [4, 5, 6, 9, 18]].any() and torch.equal(kv, before)
    back = ints((19, 7), (7, 9), (0, 8), (3, 10))
    kept = host.tensor.clone()
    mover.into(back)
    expected = before.clone()
    for source, target in back.tolist():
        expected[:, :, target] = kept[:, :, source]
    assert torch.equal(kv, expected) and torch.equal(host.tensor, kept)


def test_a_half_is_written_again_only_after_it_was_read(pools):
    kv, host = pools
    gpu, steps = Gpu(), Stream("steps")
    mover = BlockMover(kv, host, 1, gpu, steps)
    moves = mover.out(ints((0, 0), (1, 1), (2, 2)))
    # the third piece takes the first half again: the step waits until that half has left for the host, and for nothing else
    assert steps.waited == [moves[0][1]] and len(gpu.side.waited) == 3
    steps.waited.clear(), gpu.side.waited.clear()
    back = mover.into(ints((0, 5), (1, 6)))
    # the bus waits until the halves have left, which is its own work; the step waits for what the bus brought
    assert gpu.side.waited == [moves[1][1], moves[2][1]] and steps.waited == [end for _, end in back]
    gpu.side.waited.clear()
    mover.into(ints((2, 7)))
    assert len(gpu.side.waited) == 1 and gpu.side.waited[0] not in [end for _, end in back]  # the step's reading of the half
    mover.settle()
    assert gpu.side.synchronized == 1 and steps.synchronized == 0


def test_memory_that_could_not_be_pinned_is_copied_plainly(pools, monkeypatch):
    kv, host = pools

    def refuse():
        raise ConfigError("swap_space: planted", "swap_space")

    monkeypatch.setattr(host, "wait", refuse)
    mover = BlockMover(kv, host, 2, Gpu(), Stream("steps"))
    assert mover.out(ints((4, 9), (2, 1))) == []
    assert torch.equal(host.tensor[:, :, [9, 1]], kv[:, :, [4, 2]])
    assert mover.into(ints((9, 0))) == [] and torch.equal(kv[:, :, 0], kv[:, :, 4])
