"""RowTable: placing, clearing, columns."""

import numpy as np
import pytest

from octavo.engine.rows import DECODE, FREE, PREFILL, STOP_COLUMNS, RowTable


def make() -> RowTable:
    table = RowTable(3, 40, 8)
    table.place(1, np.arange(10, dtype=np.int32), 10, 8, [5, 3], 30, 16)
    return table


def test_a_row_holds_what_it_was_given():
    table = make()
    assert table.known_tokens(1).tolist() == list(range(10)) and table.table(1).tolist() == [5, 3]
    assert (table.length[1], table.known[1], table.computed[1], table.written[1]) == (10, 10, 8, 8)
    assert (table.capacity[1], table.num_blocks[1], table.limit[1], table.next_publish[1]) == (16, 2, 30, 16)
    assert table.in_state(PREFILL).tolist() == [1] and table.output(1) == []
    table.check()
    with pytest.raises(AssertionError, match="row 1 has an owner"):
        table.place(1, np.zeros(1, np.int32), 1, 0, [0], 3, 8)


def test_clearing_returns_the_blocks_and_moves_the_generation_on():
    table = make()
    before = int(table.generation[1])
    assert table.clear(1) == [5, 3]
    assert table.generation[1] == before + 1 and table.state[1] == FREE and table.num_blocks[1] == 0


def test_blocks_are_replaced_or_appended():
    table = make()
    table.set_block(1, 1, 9)
    assert table.table(1).tolist() == [5, 9] and table.capacity[1] == 16
    table.set_block(1, 2, 4)
    assert table.table(1).tolist() == [5, 9, 4] and table.capacity[1] == 24


def test_stops_beyond_the_columns_are_counted():
    table = make()
    table.set_kind(1, tuple(range(STOP_COLUMNS)), streams=True, beam=False)
    assert table.num_many_stops == 0 and table.stops[:, 1].tolist() == [0, 1, 2, 3] and table.streams[1]
    table.set_kind(1, tuple(range(STOP_COLUMNS + 1)), streams=False, beam=True)
    assert table.num_many_stops == 1 and table.many_stops[1] and table.beams[1]
    table.clear(1)
    assert table.num_many_stops == 0 and not table.beams[1]


@pytest.mark.parametrize("damage", [
    lambda t: t.computed.__setitem__(1, 11), lambda t: t.written.__setitem__(1, 9), lambda t: t.known.__setitem__(1, 11),
    lambda t: t.capacity.__setitem__(1, 24), lambda t: t.state.__setitem__(1, DECODE), lambda t: t.limit.__setitem__(1, 9)])
def test_check_sees_damage(damage):
    table = make()
    damage(table)
    with pytest.raises(AssertionError, match="row 1"):
        table.check()
