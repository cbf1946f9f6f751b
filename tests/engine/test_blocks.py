"""BlockPool: references, names, eviction."""

import pytest

from octavo.engine.blocks import BlockPool


def name(i: int) -> bytes:
    return bytes([i]) * 32


def test_free_cached_used_add_up():
    pool = BlockPool(6)
    a, b = pool.take(2), pool.take(3)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 0, 5)
    assert len({*a, *b}) == 5
    assert pool.publish(a[0], name(1))
    pool.release(a)
    assert (pool.num_free, pool.num_cached, pool.num_used, pool.num_available) == (2, 1, 3, 3)
    pool.release(b)
    pool.check()
    assert pool.num_used == 0


def test_a_block_is_free_only_after_its_last_reference():
    pool = BlockPool(2)
    block = pool.take(1)
    pool.share(block)
    pool.release(block)
    assert pool.num_used == 1
    pool.release(block)
    assert pool.num_used == 0
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(block)


def test_never_cached_blocks_go_first_then_the_least_recently_used_prefix():
    pool = BlockPool(4)
    blocks = pool.take(4)
    for i in (0, 1, 2):
        pool.publish(blocks[i], name(i))
    pool.release(blocks[:2])  # one sequence: its tail goes before its root
    pool.release(blocks[2:])
    assert pool.take(1) == [blocks[3]]
    assert pool.take(1) == [blocks[1]]
    assert pool.find(name(1)) is None and pool.find(name(0)) == blocks[0]
    assert pool.take(2) == [blocks[0], blocks[2]]
    pool.check()
    assert not pool.published()


def test_a_cached_block_comes_back_with_its_contents():
    pool = BlockPool(2)
    block = pool.take(1)
    pool.publish(block[0], name(7))
    pool.release(block)
    assert pool.num_idle(block) == 1
    pool.share([pool.find(name(7))])
    assert pool.num_idle(block) == 0 and pool.num_used == 1 and pool.num_cached == 0
    pool.check()


def test_the_first_of_two_equal_blocks_keeps_the_name():
    pool = BlockPool(2)
    a, b = pool.take(2)
    assert pool.publish(a, name(1)) and not pool.publish(b, name(1))
    pool.release([a, b])
    assert (pool.num_free, pool.num_cached) == (1, 1)
    pool.check()


def test_more_than_there_is_is_a_bug_of_the_caller():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 available"):
        pool.take(3)
    with pytest.raises(AssertionError, match="without an owner"):
        pool.publish(0, name(1))


@pytest.mark.parametrize("damage", [
    lambda pool: pool.refs.__setitem__(0, 0), lambda pool: pool._free.append(0), lambda pool: pool._cached.__setitem__(1, None),
    lambda pool: pool._by_digest.clear()])
def test_check_sees_damage(damage):
    pool = BlockPool(3)
    blocks = pool.take(2)
    pool.publish(blocks[0], name(1))
    pool.check()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check()
