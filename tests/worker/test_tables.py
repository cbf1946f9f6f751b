"""The tables after random plans hold what a plain model in lists holds, and a plan that does not fit is refused."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.plan import NewRow, RowSampling, StepPlan, checksum
from octavo.worker.tables import Tables


def ints(*values):
    return np.array(values, np.int32)


def make(world):
    return Tables(world.num_rows, world.max_model_len, world.block_size, world.num_blocks)


def compare(tables, world):
    assert tables.active().tolist() == sorted(world.rows)
    for number, row in world.rows.items():
        assert tables.describe(number) == row.facts()
        assert tables.output(number).tolist() == row.tokens[row.num_prompt :]
        s = row.sampling
        for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition"):
            assert getattr(tables, name)[number] == np.float32(getattr(s, name)), name
        for name in ("top_k", "index", "logprobs", "prompt_logprobs", "beam"):
            assert getattr(tables, name)[number] == getattr(s, name), name
        assert int(tables.seed.view(np.uint64)[number]) == s.seed
        assert tables.min_tokens[number] == (s.min_tokens if s.stop_ids else 0)


def lock(plan):
    """From now on a write into the plan's arrays is an error."""
    for part in (plan, *plan.new):
        for value in (getattr(part, name) for name in part.__struct_fields__):
            if isinstance(value, np.ndarray):
                value.flags.writeable = False


@settings(max_examples=60, deadline=None)
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 12))
def test_random_plans_leave_what_the_plain_model_says(plain_world, rng, steps):
    world = plain_world()
    tables = make(world)
    for _ in range(steps):
        plan = world.next_plan(rng)
        lock(plan)
        tables.apply(plan)
        compare(tables, world)
        tables.check(plan)
        drawn = {r: rng.randrange(50) for r in plan.sample_rows.tolist() if not world.rows[r].sampling.beam}
        tables.write(np.array(list(drawn), np.intp), ints(*drawn.values()))
        tables.advance(plan)
        world.finish(plan, drawn)
        compare(tables, world)
        live = sorted(world.rows)
        lengths = ints(*(len(world.rows[r].tokens) for r in live))
        assert tables.checksum() == checksum(ints(*live), lengths, [ints(*world.rows[r].blocks) for r in live])


def new_row(row=1, generation=3, tokens=(5, 6, 7, 8, 9), num_prompt=5, start=4, blocks=(2, 3), **sampling):
    return NewRow(
        row=row,
        generation=generation,
        tokens=ints(*tokens),
        num_prompt=num_prompt,
        start=start,
        blocks=ints(*blocks),
        sampling=RowSampling(**sampling),
    )


def decode_step(step, **changes):
    values = {
        "epoch": 1,
        "step": step,
        "rows": ints(1),
        "starts": ints(4),
        "counts": ints(1),
        "sample_rows": ints(1),
        "sample_from": ints(0),
        "sample_pos": ints(5),
        "sample_generations": ints(3),
    }
    return StepPlan(**{**values, **changes})


def started():
    tables = Tables(4, 16, 4, 10)
    tables.apply(StepPlan(epoch=1, step=0, new=[new_row()]))
    return tables


def test_a_good_step_passes_and_another_start_does_not():
    tables = started()
    plan = decode_step(1)
    tables.apply(plan)
    tables.check(plan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"starts": ints(3)}, "row 1 cannot compute 1 tokens from 3 at step 1.*4 computed of 5"),
        ({"counts": ints(2)}, "cannot compute 2 tokens from 4"),
        ({"counts": ints(0)}, "cannot compute 0 tokens"),
        ({"rows": ints(2), "starts": ints(0)}, "row 2 cannot compute.*generation -1"),
        ({"rows": ints(1, 1), "starts": ints(4, 4), "counts": ints(1, 1)}, "computes a row twice"),
        ({"sample_generations": ints(2)}, "generation 2 and position 5, the device has generation 3 and length 5"),
        ({"sample_pos": ints(6)}, "position 6"),
        ({"sample_rows": ints(2)}, "row 2 cannot sample"),
        (
            {"sample_rows": ints(1, 1), "sample_from": ints(0, 0), "sample_pos": ints(5, 5),
             "sample_generations": ints(3, 3)},
            "samples a row twice",
        ),
    ],
)  # fmt: skip
def test_work_that_does_not_fit_is_refused_with_values(changes, words):
    tables = started()
    plan = decode_step(1, **changes)
    tables.apply(plan)
    with pytest.raises(RuntimeError, match=words):
        tables.check(plan)


def test_a_row_that_samples_before_its_last_token_is_refused():
    tables = Tables(4, 16, 4, 10)
    plan = decode_step(0, new=[new_row(start=0)], starts=ints(0), counts=ints(3))
    tables.apply(plan)
    with pytest.raises(RuntimeError, match="its logits stand at 3"):
        tables.check(plan)


def test_blocks_must_cover_what_is_computed():
    tables = Tables(4, 16, 4, 10)
    plan = decode_step(0, new=[new_row(blocks=(2,))])
    tables.apply(plan)
    with pytest.raises(RuntimeError, match="1 blocks of 4"):
        tables.check(plan)


@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (1, 2), (2, 1), (2, 0)])
def test_a_lost_or_repeated_plan_changes_nothing(epoch, step):
    tables = started()
    before = tables.describe(1)
    with pytest.raises(RuntimeError, match=f"epoch {epoch}, step {step} arrived where epoch 1, step 1 is due"):
        tables.apply(StepPlan(epoch=epoch, step=step, ended=ints(1)))
    assert tables.describe(1) == before
    tables.apply(StepPlan(epoch=1, step=1))


def test_the_first_plan_must_have_step_0():
    with pytest.raises(RuntimeError, match="step 4 arrived where any epoch, step 0"):
        Tables(4, 16, 4, 10).apply(StepPlan(epoch=1, step=4))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"ended": ints(2)}, "ends row 2"),
        ({"new": [new_row()]}, "row 1 of 4 cannot start with generation 3: its owner is 3"),
        ({"new": [new_row(row=4)]}, "row 4 of 4 cannot start"),
        ({"new": [new_row(row=2, tokens=range(17), num_prompt=17)]}, "cannot start with 17 tokens"),
        ({"new": [new_row(row=2, start=6)]}, "5 tokens, 5 of them prompt, and 6 computed"),
        ({"new": [new_row(row=2, start=4, blocks=())]}, "0 blocks of 4 for 4 tokens"),
        ({"new": [new_row(row=2, blocks=(1, 2, 3, 4, 5))]}, "at most 4"),
        ({"new": [new_row(row=2, blocks=(1, 10))]}, "blocks 1 to 10 are outside a pool of 10"),
        ({"append_rows": ints(2), "append_index": ints(0), "append_blocks": ints(1)}, "append a block to row 2"),
        ({"append_rows": ints(1), "append_index": ints(4), "append_blocks": ints(1)}, "block index 4"),
        ({"append_rows": ints(1), "append_index": ints(2), "append_blocks": ints(-1)}, "blocks -1 to -1"),
        ({"forced_rows": ints(2), "forced_tokens": ints(1)}, "force a token into row 2"),
        ({"forced_rows": ints(*[1] * 13), "forced_tokens": ints(*[1] * 13)}, "row 1 has no place"),
    ],
)
def test_changes_that_contradict_the_tables_are_refused(plan, words):
    with pytest.raises(RuntimeError, match=words):
        started().apply(StepPlan(epoch=1, step=1, **plan))


def test_a_row_may_end_and_start_in_the_same_plan():
    tables = started()
    again = new_row(generation=9, tokens=(1,), num_prompt=1, start=0)
    tables.apply(StepPlan(epoch=1, step=1, ended=ints(1), new=[again]))
    assert tables.describe(1) == {"generation": 9, "tokens": [1], "computed": 0, "num_prompt": 1, "blocks": [2, 3]}


def test_a_full_row_samples_once_more_and_never_computes_it():
    tables = Tables(1, 8, 4, 4)
    new = new_row(row=0, tokens=range(8), num_prompt=8, start=7, blocks=(0, 1))
    first = decode_step(0, new=[new], rows=ints(0), starts=ints(7), sample_rows=ints(0), sample_pos=ints(8))
    tables.apply(first)
    tables.check(first)
    tables.write(np.array([0]), ints(42))
    tables.advance(first)
    assert tables.describe(0)["tokens"] == [*range(8), 42]
    over = decode_step(1, rows=ints(0), starts=ints(8), sample_rows=ints(), sample_from=ints(), sample_pos=ints(),
                       sample_generations=ints())  # fmt: skip
    tables.apply(over)
    with pytest.raises(RuntimeError, match=re.escape("row 0 cannot compute 1 tokens from 8")):
        tables.check(over)
