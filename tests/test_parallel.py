"""The group of one: it changes nothing, and larger ones are not pretended."""

import pytest
import torch

from octavo.parallel import Shards


def test_a_group_of_one_leaves_tensors_alone() -> None:
    x = torch.arange(3.0)
    Shards().all_reduce(x)
    assert x.tolist() == [0.0, 1.0, 2.0]
    assert (Shards().rank, Shards().size) == (0, 1)


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 1), (0, 0)])
def test_a_larger_group_does_not_exist_yet(rank: int, size: int) -> None:
    with pytest.raises(AssertionError):
        Shards(rank, size)
