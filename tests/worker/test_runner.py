"""The runner on a tiny random decoder: chunks, copies, swaps, forks and failures do not change what a row says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.models.source import ModelSource
from octavo.plan import checksum
from octavo.worker.group import check_supported
from octavo.worker.runner import ModelRunner

SOURCE = ModelSource("folder", Path("."), {"torch_dtype": "float32"})
PROMPT = [int(t) for t in np.random.default_rng(0).integers(0, 61, 37)]
GIVE = {
    "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 24, "swap_space": 0.001, "block_size": 8
}  # fmt: skip


def make_runner(tiny, decoder=None, **options):
    config = EngineConfig(model="tiny", **{**GIVE, **options})
    return ModelRunner(config, SOURCE, decoder=decoder or tiny.decoder(tiny.spec()))


@pytest.fixture
def runner(tiny):
    return make_runner(tiny)


def alone(tiny, prompt, n, **sampling):
    """n tokens of a prompt computed whole, then token by token."""
    host = tiny.Host(make_runner(tiny))
    host.step({0: len(prompt)}, new=[host.new(0, prompt, range(8), **sampling)])
    for _ in range(n - 1):
        host.step({0: 1})
    return host.tokens[0][len(prompt) :]


@pytest.fixture(scope="module")
def expected(tiny):
    return alone(tiny, PROMPT, 12)


def test_the_first_token_is_the_models_own(tiny, runner):
    """Against the decoder called by hand on the whole prompt, next to nobody."""
    host = tiny.Host(runner)
    result = host.step({0: 37}, new=[host.new(0, PROMPT, range(8), logprobs=3)])
    hidden = runner._decoder.forward(
        torch.tensor(PROMPT),
        torch.arange(37),
        kv := torch.zeros_like(runner.kv),
        meta_of(range(8), 37),
    )
    logits = torch.log_softmax(runner._decoder.logits(hidden[-1:]), -1)[0]
    assert result.tokens.tolist() == [int(logits.argmax())] and result.seconds > 0
    np.testing.assert_allclose(result.logprobs[0].top_logprobs[0], logits.topk(3).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runner.kv[:, :, :4], kv[:, :, :4])


def meta_of(blocks, tokens):
    from octavo.ops.attention import AttentionMeta

    table = torch.tensor([list(blocks)], dtype=torch.int32)
    one = torch.tensor([0], dtype=torch.int32)
    return AttentionMeta(
        block_tables=table, rows=one, query_start=torch.tensor([0, tokens], dtype=torch.int32),
        context_len=torch.tensor([tokens], dtype=torch.int32), slots=torch.arange(tokens), max_query=tokens,
        max_context=tokens)  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prompt_in_chunks_says_what_the_whole_one_says(tiny, runner, expected, chunk):
    host = tiny.Host(runner)
    new = [host.new(0, PROMPT, [7, 3, 9, 1, 0, 5, 2], prompt_logprobs=1)]
    found = []
    while host.computed[0] < 37:
        result = host.step({0: min(chunk, 37 - host.computed[0])}, new=new)
        found += [lp for entry in result.prompt_logprobs for lp in entry.logprobs.tolist()]
        new = []
    while len(host.tokens[0]) < 37 + 12:
        host.step({0: 1})
    assert host.tokens[0][37:] == expected
    whole = tiny.Host(make_runner(tiny))
    result = whole.step({0: 37}, new=[whole.new(0, PROMPT, range(8), prompt_logprobs=1)])
    (entry,) = result.prompt_logprobs
    assert entry.start == 1 and entry.tokens.tolist() == PROMPT[1:]
    np.testing.assert_allclose(found, entry.logprobs, rtol=1e-4, atol=1e-5)


def test_rows_in_one_batch_do_not_hear_each_other(tiny, runner, expected):
    """A decode row, a chunk of another prompt and a third row that starts late, in mixed steps."""
    host = tiny.Host(runner)
    other = PROMPT[::-1]
    host.step({2: 37}, new=[host.new(2, PROMPT, range(8))])
    host.step({2: 1, 4: 20}, new=[host.new(4, other, range(8, 16))])
    host.step({4: 17, 2: 1})
    host.step({2: 1, 0: 5, 4: 1}, new=[host.new(0, PROMPT[:5], [20, 21, 22])])
    for _ in range(8):
        host.step({4: 1, 0: 1, 2: 1})
    assert host.tokens[2][37:] == expected
    assert host.tokens[4][37:] == alone(tiny, other, 10)
    assert host.tokens[0][5:] == alone(tiny, PROMPT[:5], 9)


def test_swapped_blocks_come_back_elsewhere(tiny, runner, expected):
    host = tiny.Host(runner)
    host.step({0: 37}, new=[host.new(0, PROMPT, range(6))])
    for _ in range(3):
        host.step({0: 1})
    known = host.tokens[0]
    out = [(b, 5 - b) for b in range(5)]  # 39 computed tokens are in blocks 0 .. 4
    new = host.new(1, PROMPT[:30], range(6))  # over the old blocks
    result = host.step({1: 30}, ended=[0], swap_out=out, new=[new])
    assert result.swap_seconds > 0
    back = [(5 - b, 10 + b) for b in range(5)]
    host.step({0: 1}, swap_in=back, new=[host.new(0, known, range(10, 17), start=39, num_prompt=37)])
    while len(host.tokens[0]) < 37 + 12:
        host.step({0: 1, 1: 1})
    assert host.tokens[0][37:] == expected
    assert host.tokens[1][30:] == alone(tiny, PROMPT[:30], 9)


def test_a_fork_copies_its_partial_block_and_goes_its_own_way(tiny, runner, expected):
    host = tiny.Host(runner)
    host.step({0: 37}, new=[host.new(0, PROMPT, range(7))])
    tokens = [*PROMPT, 11]  # the fork goes on with another token
    fork = host.new(3, tokens, [0, 1, 2, 3, 9, 10, 11], start=37, num_prompt=37)
    host.step({0: 1, 3: 1}, copies=[(4, 9)], new=[fork])
    for _ in range(10):
        host.step({3: 1, 0: 1})
    assert host.tokens[0][37:] == expected
    assert host.tokens[3][38:] == alone(tiny, tokens, 11)


def test_siblings_draw_from_one_row_of_logits(tiny, runner):
    host = tiny.Host(runner)
    sampling = {"temperature": 2.0, "seed": 5}
    new = [host.new(i, PROMPT, range(5), start=37 * (i > 0), index=i, **sampling) for i in range(4)]
    host.step({0: 37}, new=new, siblings=[(1, 0), (2, 0), (3, 0)])
    firsts = [host.tokens[i][37] for i in range(4)]
    assert firsts == [alone(tiny, PROMPT, 1, index=i, **sampling)[0] for i in range(4)] and len(set(firsts)) > 1


def test_a_beam_row_goes_on_with_the_token_that_the_host_forces(tiny, runner):
    host = tiny.Host(runner)
    result = host.step({0: 37}, new=[host.new(0, PROMPT, range(8), beam=True, logprobs=4)])
    assert result.tokens.tolist() == [-1]
    second = int(result.logprobs[0].top_tokens[0, 1])
    result = host.step({0: 1}, forced=[(0, second)])
    assert result.logprobs[0].start == 38
    assert result.logprobs[0].top_tokens[0, 0] == alone(tiny, [*PROMPT, second], 1)[0]


def test_an_empty_plan_still_applies_its_changes(tiny, runner):
    host = tiny.Host(runner)
    result = host.step(new=[host.new(0, PROMPT, range(8))], append_rows=[], ended=[])
    assert result.tokens.size == 0 and result.step == 0 and result.seconds == 0.0
    assert runner.tables.active().tolist() == [0]
    runner.kv[:, :, 3] = 2.5
    host.step(ended=[0], copies=[(3, 6)], swap_out=[(3, 1)])
    assert runner.tables.active().tolist() == []
    assert (runner.kv[:, :, 6] == 2.5).all() and (runner.host_kv[:, :, 1] == 2.5).all()


def test_edits_follow_a_row_through_its_steps(tiny, runner, expected):
    """Penalties count what was sampled, bad words and processors see it, and the row beside is not touched."""
    host = tiny.Host(runner)
    seen = []

    def watch(ids, logits):
        seen.append(list(ids))
        return logits

    runner.set_processors(2, 3, [watch])
    rows = [
        host.new(0, PROMPT, range(8)),
        host.new(1, PROMPT[:4], [8, 9], frequency=100.0),
        host.new(2, PROMPT[:4], [10, 11], allowed=(5, 6), bad_words=((5,),), processors=True),
    ]
    host.step({0: 37, 1: 4, 2: 4}, new=rows)
    for _ in range(11):
        host.step({0: 1, 1: 1, 2: 1})
    assert host.tokens[0][37:] == expected
    assert len(set(host.tokens[1][4:])) == 12  # nothing twice
    assert host.tokens[2][4:] == [6] * 12
    assert seen == [[6] * n for n in range(12)]
    assert len(set(alone(tiny, PROMPT[:4], 12))) < 12


class Failing:
    """A decoder that fails when told to."""

    def __init__(self, decoder):
        self.decoder, self.spec, self.fail = decoder, decoder.spec, ""

    def forward(self, *args):
        hidden = self.decoder.forward(*args)
        if self.fail == "forward":
            raise MemoryError("no")
        return hidden

    def logits(self, hidden):
        if self.fail == "logits":
            raise MemoryError("no")
        return self.decoder.logits(hidden)


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_a_failed_step_leaves_the_other_rows_whole(tiny, expected, where):
    decoder = Failing(tiny.decoder(tiny.spec()))
    runner = make_runner(tiny, decoder)
    host = tiny.Host(runner)
    host.step({0: 37}, new=[host.new(0, PROMPT, range(7))])
    decoder.fail = where
    plan = host.plan({1: 5}, new=[host.new(1, PROMPT[:5], [9])], append_rows=[0], append_index=[6], append_blocks=[12])
    with pytest.raises(MemoryError):
        runner.run(plan)
    # As if it had succeeded, so that a step that was planned meanwhile fits; the host drops what comes of it.
    assert runner.tables.describe(1)["computed"] == 5 and runner.tables.describe(1)["tokens"] == [*PROMPT[:5], 0]
    assert runner.tables.describe(0)["blocks"] == [0, 1, 2, 3, 4, 5, 12]
    decoder.fail = ""
    host.step({0: 1, 2: 5}, ended=[1], new=[host.new(2, PROMPT[:5], [9])])
    while len(host.tokens[0]) < 37 + 12:
        host.step({0: 1})
    assert host.tokens[0][37:] == expected
    assert host.tokens[2][5:] == alone(tiny, PROMPT[:5], 1)


def test_blocks_outside_the_pools_are_refused(tiny, runner):
    host = tiny.Host(runner)
    for step, moves in enumerate(({"copies": [(0, 24)]}, {"swap_out": [(0, 48)]}, {"swap_in": [(0, -1)]})):
        with pytest.raises(RuntimeError, match="between pools of"):
            host.step(**moves)
        assert runner.tables.step == step + 1


def test_checksums_are_of_the_rows_after_sampling(tiny):
    host = tiny.Host(make_runner(tiny, debug_checksums=True))
    result = host.step({2: 37}, new=[host.new(2, PROMPT, range(5)), host.new(0, PROMPT[:3], [7])])
    assert result.checksum == checksum(tiny.ints([0, 2]), tiny.ints([3, 38]), [tiny.ints([7]), tiny.ints(range(5))])


def test_info_says_what_was_made(tiny, runner):
    info = runner.info
    assert (info.num_blocks, info.block_size, info.max_num_seqs, info.max_num_batched_tokens) == (24, 8, 6, 64)
    assert info.num_host_blocks == 48 and info.vocab_size == 61 and info.device == "cpu"
    assert runner.kv.shape == (2, 2, 25, 8, 2, 8) and runner.host_kv.shape == (2, 2, 48, 8, 2, 8)
    assert runner.kv[:, :, 0].numel() * 4 == info.block_bytes
    assert info.max_model_len == 64
    assert make_runner(tiny, num_gpu_blocks_override=3, max_num_seqs=1).info.max_model_len == 24


def test_the_kv_cache_may_have_another_type(tiny):
    assert make_runner(tiny, kv_cache_dtype="bfloat16").kv.dtype == torch.bfloat16
    assert make_runner(tiny).kv.dtype == torch.float32


@pytest.mark.parametrize(
    ("torch_cuda", "options", "words"),
    [(None, {}, "needs a torch with CUDA"), ("13.0", {}, "no NVIDIA GPU is found"),
     ("13.0", {"batch_invariant": True}, "batch_invariant is not supported on a GPU")],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_refused(monkeypatch, torch_cuda, options, words):
    monkeypatch.setattr("torch.version.cuda", torch_cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=words):
        check_supported(EngineConfig(model="tiny", device="cuda", **options))


def test_a_window_forgets(tiny):
    """The tiny network really has a layer with a window: without it the answer differs."""
    spec = tiny.spec()
    whole = replace(spec, layers=tuple(replace(layer, window=0) for layer in spec.layers))
    host = tiny.Host(make_runner(tiny, tiny.decoder(whole)))
    result = host.step({0: 37}, new=[host.new(0, PROMPT, range(8), logprobs=0)])
    other = tiny.Host(make_runner(tiny))
    narrow = other.step({0: 37}, new=[other.new(0, PROMPT, range(8), logprobs=0)])
    assert result.logprobs[0].logprobs[0] != narrow.logprobs[0].logprobs[0]
