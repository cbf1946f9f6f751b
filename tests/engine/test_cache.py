"""PrefixCache: names of prefixes, matching and publishing."""

import hashlib

import numpy as np
import pytest

from octavo.engine.blocks import BlockPool
from octavo.engine.cache import PrefixCache, root_digest

SIZE = 4
TOKENS = np.arange(20, dtype=np.int32)


def make(enabled: bool = True) -> PrefixCache:
    return PrefixCache(BlockPool(16), SIZE, enabled=enabled)


def publish(cache: PrefixCache, tokens: np.ndarray, salt: str = "") -> list[int]:
    blocks = cache.pool.take(len(tokens) // SIZE)
    cache.publish([], root_digest(salt), tokens, np.array(blocks, np.int32), 0, len(blocks))
    return blocks


def match(cache: PrefixCache, tokens: np.ndarray, salt: str = "") -> list[int]:
    digests: list[bytes] = []
    cache.extend(digests, root_digest(salt), tokens)
    return cache.match(digests, len(tokens))


def test_a_name_is_the_chained_sha256_of_the_whole_prefix():
    digests: list[bytes] = []
    root = root_digest("tenant")
    make().extend(digests, root, TOKENS[:11])
    first = hashlib.sha256(root + TOKENS[:4].astype("<i4").tobytes()).digest()
    assert digests == [first, hashlib.sha256(first + TOKENS[4:8].astype("<i4").tobytes()).digest()]


def test_extend_goes_on_where_it_stopped():
    cache, at_once, in_parts = make(), [], []
    cache.extend(at_once, root_digest(""), TOKENS)
    for end in (3, 4, 9, 20):
        cache.extend(in_parts, root_digest(""), TOKENS[:end])
    assert at_once == in_parts and len(at_once) == 5


@pytest.mark.parametrize(("length", "found"), [(4, 0), (5, 1), (8, 1), (9, 2), (20, 4)])
def test_a_match_leaves_at_least_the_last_token(length, found):
    cache = make()
    blocks = publish(cache, TOKENS)
    assert match(cache, TOKENS[:length]) == blocks[:found]


def test_a_match_ends_at_the_first_difference_in_tokens_or_salt():
    cache = make()
    blocks = publish(cache, TOKENS)
    other = TOKENS.copy()
    other[6] = 99
    assert match(cache, other) == blocks[:1]
    other[0] = 99
    assert match(cache, other) == []
    assert match(cache, TOKENS, "tenant") == []


def test_an_evicted_root_hides_what_follows():
    cache = make()
    blocks = publish(cache, TOKENS)
    cache.pool.release([blocks[0]])
    cache.pool.take(12)  # evicts the only cached block
    assert match(cache, TOKENS) == []


def test_one_block_of_each_of_several_sequences():
    cache, chains, tables = make(), [], []
    tokens = np.stack([TOKENS[:4], TOKENS[4:8]])
    for salt in ("a", "b"):
        chains.append(([], root_digest(salt)))
        tables += cache.pool.take(1)
    cache.publish_each(chains, tokens, np.array(tables, np.int32))
    assert match(cache, TOKENS[:5], "a") == tables[:1]
    assert match(cache, TOKENS[4:9], "b") == tables[1:]
    assert [len(digests) for digests, _ in chains] == [1, 1]


def test_switched_off_it_names_and_finds_nothing():
    cache = make(enabled=False)
    digests: list[bytes] = []
    cache.extend(digests, root_digest(""), TOKENS)
    assert digests == [] and cache.match([bytes(32)], 20) == []
