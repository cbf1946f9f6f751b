"""Buffers of a forward pass: shapes, views, and which of them may overlap."""

import pytest
import torch

from octavo.layers.workspace import Arena, Fresh, Workspace, aligned
from octavo.ops.attention import AttentionMeta
from octavo.ops.fused import SKINNY_ROWS

EMPTY = torch.empty(0, dtype=torch.int32)
META = AttentionMeta(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY.long(), 0, 0)


def make(tokens: int) -> Workspace:
    return Workspace(
        torch.ones(tokens, 10), torch.empty(tokens, 10), torch.arange(tokens), META, Fresh(), torch.float32, num_heads=3,
        num_kv_heads=1, head_dim=4, up_size=14, intermediate=7)


def test_shapes() -> None:
    work = make(5)
    shapes = {name: tuple(getattr(work, name).shape) for name in Workspace.__slots__ if name not in ("meta", "fuses")}
    assert shapes == {
        "residual": (5, 10), "total": (5, 10), "delta": (5, 10), "normed": (5, 10), "positions": (5,), "qkv": (5, 20),
        "q": (5, 3, 4), "k": (5, 1, 4), "v": (5, 1, 4), "heads": (5, 3, 4), "mixed": (5, 12), "up": (5, 14), "act": (5, 7)}


def test_the_first_state_is_the_embedding() -> None:
    work = make(3)
    assert torch.equal(work.residual + work.delta, torch.ones(3, 10))


def test_q_k_v_are_views_and_nothing_of_one_sublayer_overlaps() -> None:
    work = make(3)
    work.qkv.copy_(torch.arange(60.0).view(3, 20))
    assert torch.equal(torch.cat([work.q, work.k, work.v], 1).flatten(1), work.qkv)
    work.heads.fill_(-1.0)
    assert int(work.qkv.min()) == 0
    assert torch.equal(work.mixed, torch.full((3, 12), -1.0))
    work.up.fill_(2.0)
    work.act.fill_(3.0)
    assert (work.up == 2.0).all()


def test_rows_start_on_cache_lines() -> None:
    work = make(3)
    assert work.mixed.data_ptr() % 64 == work.qkv.data_ptr() % 64
    assert work.act.data_ptr() % 64 == work.up.data_ptr() % 64


def test_an_arena_gives_the_same_places_to_every_pass_and_nothing_twice() -> None:
    arena = Arena(aligned(3 * 5 * 4) + aligned(7), "cpu")
    first = [arena.take((3, 5), torch.float32), arena.take((7,), torch.uint8)]
    first[0].fill_(1.0)
    first[1].fill_(2)
    assert (first[0] == 1.0).all() and first[0].data_ptr() % 64 == first[1].data_ptr() % 64
    with pytest.raises(RuntimeError, match="no room for 1 more"):
        arena.take((1,), torch.uint8)
    arena.restart()
    assert arena.take((2, 5), torch.float32).data_ptr() == first[0].data_ptr()


def test_a_float32_stream_beside_narrow_activations_has_room_for_its_next_value() -> None:
    work = Workspace(
        torch.ones(40, 8, dtype=torch.bfloat16), torch.empty(40, 8, dtype=torch.bfloat16), torch.arange(40), META, Fresh(),
        torch.float32, num_heads=1, num_kv_heads=1, head_dim=4, up_size=14, intermediate=7)
    before, total = work.residual, work.total
    assert work.fuses and total.shape == (SKINNY_ROWS, 8) and total.dtype == before.dtype == torch.float32
    work.exchange()
    assert work.residual is total and work.total is before
