"""What is packed for a random plan, and unpacked as a GPU would, is what plain loops over the rows make of the plan."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import fused_reference
from octavo.plan import NewRow, RowSampling, StepPlan
from octavo.worker import staging
from octavo.worker.tables import Tables

RUBBISH = 77


def ints(values):
    return np.array(values, np.int32)


class Device:
    """The tensors that ``begin_step`` reads and writes, full of rubbish before each step."""

    def __init__(self, world):
        def full(dtype, *shape):
            return torch.full(shape, RUBBISH, dtype=dtype)

        self.world, rows = world, world.num_rows
        self.most = rows * world.max_model_len
        self.words = np.empty(staging.capacity(rows, self.most), np.int32)
        self.block_tables = full(torch.int32, rows, world.max_blocks)
        self.last_token, self.parameters = full(torch.int32, rows), full(torch.int32, rows, staging.PARAMETERS)
        self.results = full(torch.int32, 4, rows)
        self.make = full

    def unpack(self, length, tokens, seqs):
        """A step of ``tokens`` tokens and ``seqs`` sequences, of what the first ``length`` words say."""
        words = torch.full((len(self.words),), RUBBISH, dtype=torch.int32)  # what is not sent is of an older step
        words[:length] = torch.from_numpy(self.words[:length])
        rows = self.world.num_rows
        self.ids, self.positions, self.slots = (self.make(torch.int64, tokens) for _ in range(3))
        self.rows, self.context_len = self.make(torch.int32, seqs), self.make(torch.int32, seqs)
        self.query_start = self.make(torch.int32, seqs + 1)
        self.sample_ints, self.sample_floats = self.make(torch.int32, 5, rows), self.make(torch.float32, 3, rows)
        self.sample_seeds, self.result_slot = self.make(torch.int64, rows), self.make(torch.int32, 1)
        fused_reference.begin_step(
            words, self.block_tables, self.last_token, self.parameters, self.ids, self.positions, self.slots, self.rows,
            self.query_start, self.context_len, self.sample_ints, self.sample_floats, self.sample_seeds, self.result_slot,
            self.world.block_size,
        )

    def run(self, plan, tables, tokens, seqs):
        """Pack the plan in as many arrays as it needs, as the runner does, and unpack them; the ids that were sent."""
        *ahead, last = staging.changes(plan)
        for part in ahead:
            self.unpack(staging.pack(self.words, slot=3, changed=part), 0, 0)
        starts = np.zeros(len(plan.rows) + 1, np.int64)
        np.cumsum(plan.counts, out=starts[1:])
        ids = staging.token_ids(plan, tables, starts)
        samples = np.where(tables.beam[plan.sample_rows], np.int32(-1), plan.sample_rows)
        length = staging.pack(
            self.words, slot=plan.step % 4, rows=plan.rows, starts=plan.starts, counts=plan.counts, ids=ids, changed=last,
            new=staging.parameters(plan.new), samples=samples, sources=(starts[plan.sample_from + 1] - 1).astype(np.int32),
            places=plan.sample_pos,
        )
        self.unpack(length, len(ids) + tokens, len(plan.rows) + seqs)
        return ids


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def check_forward(device, plan, sent, extra_tokens, extra_seqs):
    """What the forward pass reads, and what of it was sent, against loops over the rows of the plain world."""
    world, ids, known, positions, slots, starts, context = device.world, [], [], [], [], [0], []
    for number, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
        row = world.rows[number]
        for p in range(start, start + count):
            ids.append(row.tokens[p])
            known.append(-1 if count == 1 and p + 1 == len(row.tokens) else row.tokens[p])
            positions.append(p)
            slots.append(row.blocks[p // world.block_size] * world.block_size + p % world.block_size)
        starts.append(len(ids))
        context.append(start + count)
    assert sent.tolist() == known
    assert device.ids.tolist() == ids + [-1] * extra_tokens
    assert device.positions.tolist() == positions + [0] * extra_tokens
    assert device.slots.tolist() == slots + [-1] * extra_tokens
    assert device.rows.tolist() == plan.rows.tolist() + [0] * extra_seqs
    assert device.context_len.tolist() == context + [0] * extra_seqs
    assert device.query_start.tolist() == starts + [len(ids)] * extra_seqs
    assert device.result_slot.tolist() == [plan.step % 4]
    for number, row in world.rows.items():
        assert device.block_tables[number, : len(row.blocks)].tolist() == row.blocks
    return starts


def check_sampling(device, plan, starts):
    """What sampling reads: a line per sample, then padding that samples greedily for nobody."""
    rows = device.world.rows
    lines = []
    for number, source, place in zip(plan.sample_rows.tolist(), plan.sample_from.tolist(), plan.sample_pos.tolist(), strict=True):
        s, last = rows[number].sampling, starts[source + 1] - 1
        if s.beam:
            lines.append((-1, last, place, 0, 0, 0.0, 1.0, 0.0, 0))
        else:
            floats = (float32(s.temperature), float32(s.top_p), float32(s.min_p))
            lines.append((number, last, place, s.top_k, s.index, *floats, s.seed))
    lines += [(-1, 0, 0, 0, 0, 0.0, 1.0, 0.0, 0)] * (device.world.num_rows - len(lines))
    seeds = device.sample_seeds.numpy().view(np.uint64).tolist()
    columns = zip(*device.sample_ints.tolist(), *device.sample_floats.tolist(), seeds, strict=True)
    assert list(columns) == lines


@settings(max_examples=50, deadline=None)
@given(
    rng=st.randoms(use_true_random=False), steps=st.integers(1, 10), room=st.sampled_from([1, 3, 10, 1 << 16]),
    tokens=st.integers(0, 9), seqs=st.integers(0, 3),
)  # fmt: skip
def test_random_plans_reach_the_device(plain_world, rng, steps, room, tokens, seqs):
    """Sampled tokens come to the host's tables a step late, as they do from a GPU; the device needs none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "BLOCK_ROOM", room)
        world = plain_world()
        device, late = Device(world), []
        tables = Tables(world.num_rows, world.max_model_len, world.block_size, world.num_blocks)
        for _ in range(steps):
            plan = world.next_plan(rng)
            tables.apply(plan)
            tables.check(plan)
            sent = device.run(plan, tables, tokens, seqs)
            starts = check_forward(device, plan, sent, tokens, seqs)
            check_sampling(device, plan, starts)
            for number, generation, place, token in late:
                if tables.generation[number] == generation:
                    tables.tokens[number, place] = token
            drawn = torch.tensor([rng.randrange(world.vocab_size) for _ in plan.sample_rows], dtype=torch.int32)
            num = len(drawn)
            fused_reference.end_step(
                drawn, device.sample_ints[0, :num], device.last_token, device.results, device.result_slot)
            assert device.results[plan.step % 4, :num].tolist() == drawn.tolist()
            drawn = zip(plan.sample_rows.tolist(), drawn.tolist(), strict=True)
            own = {number: token for number, token in drawn if not world.rows[number].sampling.beam}
            late = [(n, world.rows[n].generation, len(world.rows[n].tokens), token) for n, token in own.items()]
            tables.write(np.array(list(own), np.intp), np.zeros(len(own), np.int32))
            tables.advance(plan)
            world.finish(plan, own)


def new_row(row, blocks=(), tokens=(1,), **sampling):
    return NewRow(row, 1, ints(tokens), 1, 0, ints(blocks), RowSampling(**sampling))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_parameters_are_bit_patterns(seed):
    one = new_row(5, temperature=0.1, top_k=2**31 - 1, top_p=1e-7, min_p=0.3, seed=seed, index=9)
    words = staging.parameters([new_row(2), one])
    assert words.shape == (2, 9) and words.dtype == np.int32
    assert struct.unpack("<ififfQii", words[1].tobytes()) == (
        5, float32(0.1), 2**31 - 1, float32(1e-7), float32(0.3), seed, 9, 0)
    assert words[0, 0] == 2 and staging.parameters([]).shape == (0, 9)


def test_a_row_has_one_last_token_in_an_array():
    """A GPU applies the entries of an array in any order."""
    new = [new_row(2, tokens=(4, 5)), new_row(0, tokens=(6,))]
    plan = StepPlan(epoch=0, step=0, new=new, forced_rows=ints([3, 2, 3]), forced_tokens=ints([7, 8, 9]))
    ((_, _, last),) = staging.changes(plan)
    assert sorted(last.reshape(-1, 2).tolist()) == [[0, 6], [2, 8], [3, 9]]


def test_more_changes_than_an_array_holds_travel_ahead(monkeypatch):
    monkeypatch.setattr(staging, "BLOCK_ROOM", 4)
    new = [new_row(0, range(3)), new_row(1, range(10, 20)), new_row(2), new_row(3, [7])]
    append = {"append_rows": ints([4, 5]), "append_index": ints([8, 0]), "append_blocks": ints([90, 91])}
    parts = staging.changes(StepPlan(epoch=0, step=0, new=new, **append))
    assert [blocks.tolist() for _, blocks, _ in parts] == [[0, 1, 2, 10], [11, 12, 13, 14], [15, 16, 17, 18], [19, 7, 90, 91]]
    assert [runs.tolist() for runs, _, _ in parts] == [
        [[0, 0, 3, 0], [1, 0, 1, 3]], [[1, 1, 4, 0]], [[1, 5, 4, 0]],
        [[1, 9, 1, 0], [3, 0, 1, 1], [4, 8, 1, 2], [5, 0, 1, 3]]]
    assert [last.size for *_, last in parts] == [0, 0, 0, 8]
    many = {name: np.arange(9, dtype=np.int32) for name in append}  # more than an array holds, and nothing before them
    parts = staging.changes(StepPlan(epoch=0, step=0, **many))
    assert [blocks.tolist() for _, blocks, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [runs[:, 3].tolist() for runs, _, _ in parts] == [[0, 1, 2, 3], [0, 1, 2, 3], [0]]


def test_nothing_is_a_header():
    out = np.full(staging.capacity(4, 4), RUBBISH, np.int32)
    ((runs, blocks, last),) = staging.changes(StepPlan(epoch=0, step=0))
    assert runs.size == blocks.size == last.size == 0
    # after the header come the borders of no sequences: one zero
    assert staging.pack(out, slot=2, changed=(runs, blocks, last)) == staging.HEADER + 1
    assert out[: staging.HEADER + 2].tolist() == [0] * 7 + [2] + [0] * 9 + [RUBBISH]


def test_a_decode_step_sends_eight_words_a_row_and_five_for_a_block():
    rows, ones = np.arange(100, dtype=np.int32), np.ones(100, np.int32)
    plan = StepPlan(epoch=0, step=0, append_rows=rows[:7], append_index=ones[:7], append_blocks=ones[:7])
    (changed,) = staging.changes(plan)
    out = np.empty(staging.capacity(100, 100), np.int32)
    length = staging.pack(
        out, slot=0, rows=rows, starts=ones, counts=ones, ids=-ones, changed=changed, samples=rows, sources=rows, places=ones)
    assert length == staging.HEADER + 8 * 100 + 1 + 5 * 7


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 9), extra=st.integers(0, 20), room=st.integers(1, 30), longest=st.integers(1, 30))
def test_capacity_is_enough_for_the_worst_plan(num, extra, room, longest):
    """Every row starts with blocks, computes, samples, and gets a block more; what an array holds is cut as finely as it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "BLOCK_ROOM", room)
        rows, ones = np.arange(num, dtype=np.int32), np.ones(num, np.int32)
        new = [new_row(row, range(1 + row * longest % 7)) for row in range(num)]
        plan = StepPlan(epoch=0, step=0, new=new, append_rows=rows, append_index=ones, append_blocks=ones,
                        forced_rows=rows, forced_tokens=ones)
        counts = ones.copy()
        counts[-1] += extra
        out = np.empty(staging.capacity(num, num + extra), np.int32)
        for changed in staging.changes(plan):
            ids = np.zeros(num + extra, np.int32)
            length = staging.pack(
                out, slot=0, rows=rows, starts=ones, counts=counts, ids=ids, changed=changed, new=staging.parameters(new),
                samples=rows, sources=rows, places=ones)
            assert length <= len(out)
        assert sum(len(blocks) for _, blocks, _ in staging.changes(plan)) == num + sum(len(n.blocks) for n in new)
