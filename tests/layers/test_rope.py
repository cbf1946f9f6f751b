"""Rotation: by complex numbers, at far positions, and in place inside a wider tensor."""

import math

import pytest
import torch

from octavo.layers.rope import Rope

FREQUENCIES = torch.tensor([1.0, 0.3, 0.01])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head_dim", [6, 10])
def test_pairs_turn_by_position_times_frequency(interleaved: bool, head_dim: int) -> None:
    rope = Rope(FREQUENCIES, 1.0, 50, interleaved=interleaved)
    wide = torch.randn(4, 5, head_dim)
    before, positions = wide.clone(), torch.tensor([0, 49, 7, 7])
    rope(wide[:, :3], wide[:, 3:], positions)
    for t, position in enumerate(positions.tolist()):
        for i, frequency in enumerate(FREQUENCIES.tolist()):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
            turn = complex(math.cos(position * frequency), math.sin(position * frequency))
            for head in range(5):
                number = complex(before[t, head, a], before[t, head, b]) * turn
                assert complex(wide[t, head, a], wide[t, head, b]) == pytest.approx(number, abs=1e-5)
    assert torch.equal(wide[..., 6:], before[..., 6:])


def test_the_table_is_cosines_then_sines_times_the_magnitude() -> None:
    table = Rope(FREQUENCIES, 1.5, 4, interleaved=False).cos_sin
    assert table.shape == (4, 6)
    assert table.dtype == torch.float32
    angles = torch.arange(4)[:, None] * FREQUENCIES
    torch.testing.assert_close(table, 1.5 * torch.cat((angles.cos(), angles.sin()), 1))


def test_far_positions_round_like_float32_angles() -> None:
    """The angle is rounded to float32 first, as in training; its cosine is then exact."""
    position = 100_003
    frequency = torch.tensor([0.7310586])
    table = Rope(frequency, 1.0, position + 1, interleaved=False).cos_sin
    angle = float(torch.tensor(float(position)) * frequency[0])
    assert table[position].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=6e-8)
