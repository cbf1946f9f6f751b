"""A batch of a random plan is what plain loops over its rows make of it; pure decode takes its own path to the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.plan import NewRow, RowSampling, StepPlan
from octavo.worker.batch import build
from octavo.worker.tables import Tables


def plain(plan, world):
    """ids, positions, slots, query_start and context_len by loops."""
    ids, positions, slots, starts, context = [], [], [], [0], []
    for number, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
        row = world.rows[number]
        for p in range(start, start + count):
            ids.append(row.tokens[p])
            positions.append(p)
            slots.append(row.blocks[p // world.block_size] * world.block_size + p % world.block_size)
        starts.append(len(ids))
        context.append(start + count)
    return ids, positions, slots, starts, context


def check(batch, plan, world, tables):
    ids, positions, slots, starts, context = plain(plan, world)
    meta = batch.meta
    assert batch.ids.tolist() == ids and batch.positions.tolist() == positions and meta.slots.tolist() == slots
    assert batch.starts.tolist() == starts == meta.query_start.tolist()
    assert meta.context_len.tolist() == context and meta.rows.tolist() == plan.rows.tolist()
    assert meta.max_query == plan.counts.max() and meta.max_context == max(context)
    assert meta.block_tables is tables.block_tables
    names = ("ids", "positions")
    assert [str(getattr(batch, n).dtype) for n in names] + [str(meta.slots.dtype)] == ["torch.int64"] * 3
    assert {str(t.dtype) for t in (meta.rows, meta.query_start, meta.context_len, meta.block_tables)} == {"torch.int32"}
    # the i-th sampling row reads the logits of the last token of the row that it names
    hidden = np.arange(len(ids))
    logits = hidden if batch.logits is None else hidden[batch.logits.numpy()]
    assert len(set(logits.tolist())) == len(logits)
    read = logits if batch.logits_of is None else logits[batch.logits_of.numpy()]
    if plan.sample_rows.size:
        assert read.tolist() == [starts[i + 1] - 1 for i in plan.sample_from.tolist()]


@settings(max_examples=60, deadline=None)
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 10), decode_only=st.booleans())
def test_random_plans(plain_world, rng, steps, decode_only):
    world = plain_world()
    tables = Tables(world.num_rows, world.max_model_len, world.block_size, world.num_blocks)
    for _ in range(steps):
        plan = world.next_plan(rng, decode_only=decode_only)
        tables.apply(plan)
        tables.check(plan)
        if plan.rows.size:
            check(build(plan, tables), plan, world, tables)
        drawn = {r: rng.randrange(50) for r in plan.sample_rows.tolist() if not world.rows[r].sampling.beam}
        tables.write(np.array(list(drawn), np.intp), np.array(list(drawn.values()), np.int32))
        tables.advance(plan)
        world.finish(plan, drawn)


def ints(*values):
    return np.array(values, np.int32)


def decode_tables(rows):
    tables = Tables(8, 32, 4, 40)
    new = [
        NewRow(row=r, generation=1, tokens=ints(*range(r, r + 5)), num_prompt=5, start=4, blocks=ints(2 * r, 2 * r + 1),
               sampling=RowSampling())
        for r in rows
    ]  # fmt: skip
    return tables, new


def test_a_decode_step_of_all_its_rows_selects_no_logits():
    tables, new = decode_tables((5, 2, 7))
    plan = StepPlan(epoch=1, step=0, new=new, rows=ints(5, 2, 7), starts=ints(4, 4, 4), counts=ints(1, 1, 1),
                    sample_rows=ints(5, 2, 7), sample_from=ints(0, 1, 2), sample_pos=ints(5, 5, 5),
                    sample_generations=ints(1, 1, 1))  # fmt: skip
    tables.apply(plan)
    batch = build(plan, tables)
    assert batch.logits is None and batch.logits_of is None
    assert batch.ids.tolist() == [9, 6, 11] and batch.meta.slots.tolist() == [44, 20, 60]


def test_siblings_share_one_row_of_logits():
    tables, new = decode_tables((0, 1))
    plan = StepPlan(epoch=1, step=0, new=new, rows=ints(0, 1), starts=ints(4, 4), counts=ints(1, 1),
                    sample_from=ints(1, 1, 0, 1))  # fmt: skip
    tables.apply(plan)
    batch = build(plan, tables)
    assert batch.logits is None and batch.logits_of.tolist() == [1, 1, 0, 1]
