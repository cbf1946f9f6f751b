"""HostTier: where a prefix goes when the device pool needs its block, and how it comes back: the second tier of the cache.

Owns what the plan in the making saves from evicted device blocks, and which host blocks hold a prefix (the names live in
the host pool, as they live in the device pool); it does not know requests or rows. A host block that nobody uses and that
holds a prefix is *cached*: ``BlockPool.take`` evicts it, least recently used first, so swapped sequences always get it.

A restored prefix keeps its host copy. The two tiers may name the same hash, each at most once; evicting such a block from
the device again costs a touch and no copy. A restored device block gets its name as any block that a row has written: when
the result of the step comes (update.py), so a failed restore names nothing.

Invariant: a host block gets a name only after the step that copied into it has succeeded, and holds a reference from the
moment a plan names it until no plan that is still to be submitted can overwrite what it reads. What a failed step should
have saved is never found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo.engine.blocks import BlockPool

MAX_SAVES = 64
"""Most evicted prefixes that one step saves. 1024 rows that decode take 64 blocks of 16 tokens a step, so steady decoding
saves all; an admission that evicts hundreds at once loses the rest rather than make everybody wait for the bus."""

HOST_SHARE = 4
"""A step saves into at most one in so many host blocks: they are reserved until its result comes, and meanwhile a sequence
that is swapped out must find room."""


@dataclass(slots=True)
class Saves:
    """Prefixes that one plan copies to host memory: device blocks, host blocks, digests, in the order of eviction."""

    blocks: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


class HostTier:
    """Saves what a device pool evicts.

    Args:
        pool: the device blocks; asked to tell of evictions when the tier is on. host_pool: the host blocks.
        enabled: False saves and finds nothing, as do zero host blocks. ready: whether host memory takes blocks yet; what is
            evicted before is lost, because a step would wait for it.
    """

    def __init__(
        self, pool: BlockPool, host_pool: BlockPool, *, enabled: bool, ready: Callable[[], bool] = lambda: True
    ) -> None:
        self.host_pool, self._ready = host_pool, ready
        self.enabled = enabled and host_pool.num_blocks > 0
        self.saves = Saves()
        self._most = min(MAX_SAVES, max(host_pool.num_blocks // HOST_SHARE, 1))
        if self.enabled:
            pool.on_evict = self._save

    def match(self, digests: Sequence[bytes], start: int, num_tokens: int, block_size: int) -> list[int]:
        """Host blocks that go on where the device tier stopped, at block ``start``; never the last token (cache.py)."""
        found: list[int] = []
        if self.enabled:
            find = self.host_pool.find
            for digest in digests[start : (num_tokens - 1) // block_size]:
                block = find(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def take_saves(self) -> Saves:
        """What the plan in the making has to copy; the caller keeps it until the plan's result comes."""
        saves, self.saves = self.saves, Saves()
        return saves

    def confirm(self, saves: Saves) -> None:
        """The step that made these copies has succeeded: name them, and let others have the blocks when they must.

        The device evicts a prefix from its tail, so the host gets its tail first too, and evicts it first.
        """
        self.host_pool.settle(saves.host, saves.digests)

    def abandon(self, saves: Saves) -> None:
        """The copies may be missing: the host blocks are free again."""
        self.host_pool.release(saves.host)

    def _save(self, blocks: list[int], digests: list[bytes]) -> None:
        """The device pool gives ``blocks`` away: copy them in the plan that does, which moves blocks out first."""
        if not self._ready():
            return
        host, saves = self.host_pool, self.saves
        there = [host.find(digest) for digest in digests]
        for found in there:
            if found is not None:
                host.touch(found)
        room = min(self._most - len(saves.host), host.num_available)
        missing = [i for i, found in enumerate(there) if found is None][:room]
        if missing:
            saves.host += host.take(len(missing))
            saves.blocks += [blocks[i] for i in missing]
            saves.digests += [digests[i] for i in missing]
