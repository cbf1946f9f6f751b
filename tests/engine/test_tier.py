"""HostTier: evicted prefixes go to host blocks, come back on a match, and nothing that a failed step moved is trusted."""

import contextlib
import random

import numpy as np
import pytest
from fakes import ROOT, Bench, after, kv_of

from octavo.engine.blocks import BlockPool
from octavo.engine.cache import root_digest
from octavo.engine.tier import MAX_SAVES, HostTier
from octavo.errors import EngineDead


def name(i: int) -> bytes:
    return i.to_bytes(4, "little") * 8


def fill(pool: BlockPool, first: int, count: int) -> list[int]:
    """Cached blocks with names first, first + 1, ...; the first is evicted first."""
    blocks = pool.take(count)
    pool.settle(blocks, [name(first + i) for i in range(count)])
    return blocks


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 13 + i * i * 7 + i) % 40 + 6 for i in range(length)]


# -- the tier alone ----------------------------------------------------------------------------------------------------


def test_what_is_evicted_is_saved_and_found_once_the_step_has_succeeded():
    pool, host = BlockPool(3), BlockPool(8)
    tier = HostTier(pool, host, enabled=True)
    blocks = fill(pool, 0, 3)
    taken = pool.take(2)
    saves = tier.take_saves()
    assert taken == saves.blocks == blocks[:2] and saves.digests == [name(0), name(1)] and len(set(saves.host)) == 2
    chain = [name(i) for i in range(3)]
    assert tier.match(chain, 0, 25, 8) == [] and host.num_used == 2  # a copy under way is nobody's
    tier.confirm(saves)
    host.check()
    assert tier.match(chain, 0, 25, 8) == saves.host and (host.num_used, host.num_cached) == (0, 2)
    assert tier.match(chain, 1, 25, 8) == saves.host[1:] and tier.match(chain, 0, 16, 8) == saves.host[:1]
    assert not tier.saves.host


def test_a_failed_step_has_saved_nothing():
    pool, host = BlockPool(3), BlockPool(8)
    tier = HostTier(pool, host, enabled=True)
    fill(pool, 0, 3)
    pool.take(3)
    tier.abandon(tier.take_saves())
    host.check()
    assert host.num_free == 8 and not host.published()


def test_what_is_evicted_before_host_memory_is_ready_is_lost():
    ready = False
    pool, host = BlockPool(3), BlockPool(8)
    tier = HostTier(pool, host, enabled=True, ready=lambda: ready)
    fill(pool, 0, 3)
    pool.take(1)
    assert not tier.take_saves().host and host.num_used == 0
    ready = True
    pool.take(1)
    saves = tier.take_saves()
    assert saves.digests == [name(1)] and len(saves.host) == 1


def test_the_oldest_host_prefix_makes_room_and_a_second_eviction_copies_nothing():
    pool, host = BlockPool(4), BlockPool(8)
    tier = HostTier(pool, host, enabled=True)
    fill(host, 0, 8)
    fill(pool, 0, 1)  # restored from the host some time ago
    fill(pool, 100, 2)
    pool.take(4)
    saves = tier.take_saves()
    assert saves.digests == [name(100), name(101)]
    tier.confirm(saves)
    host.check()
    assert host.find(name(0)) is not None  # just missed on the device: it was the oldest, and is not any more
    assert host.find(name(1)) is None and host.find(name(2)) is None and host.find(name(3)) is not None


def test_the_tail_of_a_prefix_leaves_the_host_before_its_root():
    pool, host = BlockPool(3), BlockPool(12)
    tier = HostTier(pool, host, enabled=True)
    chain = pool.take(3)
    for i, block in enumerate(chain):
        pool.publish(block, name(i))
    pool.release(chain)
    pool.take(3)
    tier.confirm(tier.take_saves())
    host.take(10)
    assert host.find(name(0)) is not None and host.find(name(1)) is not None and host.find(name(2)) is None


def test_a_step_saves_so_many_and_leaves_room_for_swapped_sequences():
    pool, host = BlockPool(400), BlockPool(1000)
    tier = HostTier(pool, host, enabled=True)
    fill(pool, 0, 400)
    pool.take(30)
    pool.take(370)
    assert len(tier.take_saves().host) == MAX_SAVES
    small = HostTier(pool := BlockPool(20), host := BlockPool(12), enabled=True)
    fill(pool, 0, 20)
    pool.take(20)
    assert len(small.take_saves().host) == 3 and host.num_available == 9


@pytest.mark.parametrize(("blocks", "enabled"), [(0, True), (8, False)])
def test_switched_off_nobody_is_told(blocks, enabled):
    pool = BlockPool(2)
    tier = HostTier(pool, BlockPool(blocks), enabled=enabled)
    fill(pool, 0, 2)
    pool.take(2)
    assert pool.on_evict is None and not tier.saves.host and tier.match([name(0)], 0, 100, 8) == []


def test_a_full_host_pool_of_others_saves_nothing():
    pool, host = BlockPool(2), BlockPool(4)
    tier = HostTier(pool, host, enabled=True)
    host.take(4)
    fill(pool, 0, 2)
    pool.take(2)
    assert not tier.saves.host


# -- the engine over it ------------------------------------------------------------------------------------------------


def check_host(bench: Bench, tokens: list[int]) -> int:
    """Host blocks named by the prefixes of ``tokens`` hold just these; returns how many there are."""
    chain: list[bytes] = []
    state, found, places, value = bench.state, 0, [], ROOT
    state.cache.extend(chain, root_digest(""), np.array(tokens, np.int32))
    for place, token in enumerate(tokens):
        places.append(kv_of(value, token, place))
        value = after(value, places[-1], place)
    for index, digest in enumerate(chain):
        wanted = places[index * 8 : index * 8 + 8]
        if (block := state.host_pool.find(digest)) is not None:
            assert bench.group.host[block].tolist() == wanted, "a host block holds something else"
            found += 1
        if (block := state.pool.find(digest)) is not None:
            assert bench.group.kv[block].tolist() == wanted, "a device block holds something else"
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_what_comes_back_is_not_computed_again(overlap):
    bench = Bench(blocks=8, host_blocks=40, overlap=overlap, max_model_len=64)
    first, other = prompt(1, 41), prompt(2, 41)
    for i, tokens in enumerate([first, other, first, other]):
        computed = bench.engine.stats.prompt_tokens
        bench.add(f"r{i}", tokens, max_tokens=10, eos=())
        bench.run()
        assert bench.engine.stats.prompt_tokens - computed == (41 if i < 2 else 1)
        assert bench.started[f"r{i}"] == (0 if i < 2 else 40)
        assert bench.group.plans["swap_out"] > 0 or i == 0
    bench.assert_reference()
    stats = bench.engine.stats
    assert stats.prefix_hits == 80 and 48 <= stats.prefix_hits_host <= 80 and stats.host_cached > 5
    assert bench.group.plans["swap_in"] * 8 == stats.prefix_hits_host
    assert check_host(bench, first) >= 4  # its root may still be on the device


def test_a_restored_block_has_its_name_on_the_device_again():
    bench = Bench(blocks=8, host_blocks=40, max_model_len=64)
    for i, seed in enumerate([1, 2, 1]):
        bench.add(f"r{i}", prompt(seed, 41), max_tokens=2, eos=())
        bench.run()
    moved = bench.group.plans["swap_in"]
    bench.add("again", prompt(1, 41), max_tokens=2, eos=())
    bench.run()
    assert bench.started["again"] == 40 and bench.group.plans["swap_in"] == moved  # from the device, without a copy
    bench.assert_reference()


def load(bench: Bench, seed: int, count: int = 60, families: int = 5) -> None:
    """Requests of a few families of long shared beginnings, more than the device holds, arriving while others run."""
    rng = random.Random(seed)
    heads = [prompt(family, 32) for family in range(families)]
    for i in range(count):
        tokens = heads[rng.randrange(families)][: rng.choice([8, 16, 24, 32])] + prompt(90 + i, rng.randrange(1, 9))
        bench.add(f"r{i}", tokens, max_tokens=rng.randrange(1, 24), n=rng.choice([1, 1, 1, 3]), eos=(), seed=i,
                  temperature=rng.choice([0.0, 1.0]), stream=rng.random() < 0.3)
        for _ in range(rng.randrange(3)):
            bench.step()
    bench.run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["auto", "recompute", "swap"])
@pytest.mark.parametrize("host_blocks", [2, 12, 60])
def test_the_same_tokens_with_and_without_the_tier(overlap, mode, host_blocks):
    options = dict(blocks=14, rows=4, max_model_len=64, overlap=overlap, preemption_mode=mode)
    answers = []
    for blocks in (0, host_blocks):
        bench = Bench(host_blocks=blocks, **options)
        load(bench, 3)
        bench.assert_reference()
        answers.append({key: (bench.tokens(*key), end.reason) for key, end in bench.ends.items()})
        stats = bench.engine.stats
        assert (stats.prefix_hits_host > 0) == (blocks > 2) or blocks == 2
        assert stats.prefix_hits_host <= stats.prefix_hits <= stats.prefix_queries
    assert answers[0] == answers[1]


def test_without_a_prefix_cache_there_is_no_second_tier():
    bench = Bench(blocks=14, host_blocks=40, rows=4, max_model_len=64, enable_prefix_caching=False, preemption_mode="recompute")
    load(bench, 3)
    bench.assert_reference()
    assert bench.group.plans["swap_out"] == bench.group.plans["swap_in"] == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_swapped_sequences_push_prefixes_out(overlap):
    bench = Bench(blocks=10, host_blocks=12, rows=3, max_model_len=80, preemption_mode="swap", overlap=overlap)
    for i in range(6):
        bench.add(f"old{i}", prompt(i, 41), max_tokens=1)
        bench.run()
    bench.state.release_host()
    assert bench.state.host_pool.num_free <= 2 and bench.state.host_pool.num_cached >= 10
    for i in range(3):
        bench.add(f"r{i}", [6 + i] * 9, max_tokens=40, eos=())
    bench.run()
    bench.assert_reference()
    stats = bench.engine.stats
    assert stats.preempted_swap > 0 and stats.preempted_recompute == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["submit", "result"])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_what_a_failed_step_moved_is_not_trusted(overlap, where, mode):
    """Every step fails in turn; the fake loses all that it should have moved."""
    failures = hits = 0
    for step in range(0, 90, 3):
        bench = Bench(blocks=14, host_blocks=30, rows=4, max_model_len=64, overlap=overlap, preemption_mode=mode)
        bench.faults = True
        bench.group.fail = lambda now, step=step: where if now == step or now == step + 40 else None
        with contextlib.suppress(EngineDead):  # what is planned on a failed step fails too, up to the third in a row
            load(bench, step, count=20, families=3)
        bench.assert_reference()
        failures += bench.engine.stats.failed_steps
        hits += bench.engine.stats.prefix_hits_host
        for request in bench.requests.values():
            check_host(bench, request.prompt_token_ids)
    assert failures > 20 and hits > 500


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_restore_names_nothing_and_the_host_copy_stays(overlap):
    bench = Bench(blocks=8, host_blocks=40, overlap=overlap, max_model_len=64)
    bench.faults = True
    for i, seed in enumerate([1, 2]):
        bench.add(f"r{i}", prompt(seed, 41), max_tokens=10, eos=())
        bench.run()
    at = bench.group.step
    bench.group.fail = lambda step: "result" if step == at else None
    bench.add("lost", prompt(1, 41), max_tokens=10, eos=())
    bench.run()
    assert bench.group.plans["swap_in"] > 0 and bench.ends["lost", 0].reason == "error"
    check_host(bench, prompt(1, 41))
    bench.add("again", prompt(1, 41), max_tokens=10, eos=())
    bench.run()
    assert bench.started["again"] == 40 and bench.ends["again", 0].reason == "length"
    bench.assert_reference()


def test_a_sequence_that_goes_before_any_plan_has_copied_it_is_not_copied():
    """Its host blocks may be taken for others in the same plan, and a block must not be written twice."""
    bench = Bench(blocks=20, host_blocks=20, rows=3, max_model_len=64, preemption_mode="swap")
    for i in range(2):
        bench.add(f"r{i}", prompt(i, 17), max_tokens=20, eos=())
    bench.step()
    victim = bench.engine._scheduler.preemption.youngest()
    bench.engine._scheduler.preemption.preempt(victim)
    assert bench.state.swap_out and victim.host_blocks
    bench.engine.abort(victim.request.id)
    assert not bench.state.swap_out and not bench.state.swapping
    bench.run()
    assert bench.group.plans["swap_out"] == 0


def test_a_swapped_sequence_waits_until_its_copy_is_certain():
    """With overlap there may be room for it before the step that copies it is known to have succeeded."""
    bench = Bench(blocks=10, rows=3, host_blocks=40, max_model_len=80, preemption_mode="swap", overlap=True,
                  enable_prefix_caching=False)
    bench.faults = True
    for i in range(3):
        bench.add(f"r{i}", [6 + i] * 9, max_tokens=40, eos=())
    failed: list[int] = []

    def fail(step):
        if bench.group.plans["swap_out"] and not failed:
            failed.append(step)
        return "result" if failed == [step] else None

    bench.group.fail = fail
    while not failed:
        bench.step()
    victim = next(sequence.request.id for sequence in bench.state.queue)
    for name in bench.requests.keys() - {victim}:
        bench.engine.abort(name)  # room for the victim, whose blocks are not in host memory: that step fails
    bench.run()
    assert bench.ends[victim, 0].reason in ("length", "error")
    bench.assert_reference()
