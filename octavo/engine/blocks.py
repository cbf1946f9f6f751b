"""BlockPool: who may use which block of KV memory, counted by references; blocks that still hold a prefix are kept.

Owns reference counts, the map from digest to block and the order in which memory is given away; it does not know requests,
rows or tokens, and the memory itself lies with the workers. A block is in exactly one of three places:

    free    never published since it was last taken                      a stack, handed out first
    cached  nobody uses it, but a digest still names its contents        an LRU list, evicted oldest first
    used    referenced once or more, with or without a digest

Invariant: ``num_free + num_cached + num_used == num_blocks``, and ``check`` proves it. Every operation is O(1) per block.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """A pool of numbered blocks.

    Args:
        num_blocks: blocks are numbered 0 to num_blocks - 1.

    Attributes:
        refs: references of each block. on_evict: told of blocks and digests whenever prefixes are lost; None: nobody is.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self.on_evict: Callable[[list[int], list[bytes]], None] | None = None

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses and that still hold a prefix."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that ``take`` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_available

    def take(self, count: int) -> list[int]:
        """``count`` blocks with one reference each; at most ``num_available`` (asserted). Evicts prefixes when it must."""
        free = self._free
        assert count <= len(free) + len(self._cached), f"{count} blocks wanted, {self.num_available} available"
        split = max(len(free) - count, 0)
        taken = free[split:]
        del free[split:]
        taken.reverse()
        if len(taken) < count:
            taken += self._evict(count - len(taken))
        refs = self.refs
        for block in taken:
            refs[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each; a cached block comes back into use."""
        refs, cached = self.refs, self._cached
        for block in blocks:
            if refs[block] == 0:
                del cached[block]  # a KeyError here is a free block that somebody still named
            refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each, last block first: the tail of a prefix is evicted before its root."""
        refs, digests, cached, free = self.refs, self._digests, self._cached, self._free
        for block in reversed(blocks):
            left = refs[block] - 1
            assert left >= 0, f"block {block} is released once too often"
            refs[block] = left
            if left == 0:
                if digests[block] is None:
                    free.append(block)
                else:
                    cached[block] = None

    def find(self, digest: bytes) -> int | None:
        """The block that holds what ``digest`` names, used or cached."""
        return self._by_digest.get(digest)

    def touch(self, block: int) -> None:
        """Somebody would have liked to use a block that holds a prefix: it is evicted last now."""
        if self.refs[block] == 0:
            self._cached.move_to_end(block)

    def publish(self, block: int, digest: bytes) -> bool:
        """Name the contents of a used block. False: another block holds the same already and keeps the name."""
        assert self.refs[block] > 0, f"block {block} is published without an owner"
        if digest in self._by_digest or self._digests[block] is not None:
            return False
        self._by_digest[digest] = block
        self._digests[block] = digest
        return True

    def settle(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        """``publish`` and ``release`` in one, first block first, for blocks with one reference; what has a name gets none."""
        refs, names, by_digest, cached, free = self.refs, self._digests, self._by_digest, self._cached, self._free
        for block, digest in zip(blocks, digests, strict=True):
            assert refs[block] == 1 and names[block] is None, f"block {block} is shared or has a name"
            refs[block] = 0
            if digest in by_digest:
                free.append(block)
            else:
                by_digest[digest] = block
                names[block] = digest
                cached[block] = None

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` are cached now, so that sharing them lowers ``num_available``."""
        refs = self.refs
        return sum(refs[block] == 0 for block in blocks)

    def published(self) -> dict[bytes, int]:
        """A copy of the map from digest to block, for checks and tests."""
        return dict(self._by_digest)

    def check(self) -> None:
        """Prove the invariants; AssertionError names the first block that breaks one."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, f"blocks {free & cached} are free and cached"
        for block, count in enumerate(self.refs):
            assert count >= 0, f"block {block} has {count} references"
            assert (count == 0) == (block in free or block in cached), f"block {block} has {count} references"
            digest = self._digests[block]
            assert digest is None or self._by_digest.get(digest) == block, f"block {block} holds a name that is not its own"
            assert (block in cached) <= (digest is not None), f"block {block} is cached without a name"
            assert not (block in free and digest is not None), f"block {block} is free and has a name"
        assert len(self._by_digest) == sum(digest is not None for digest in self._digests)
        assert self.num_free + self.num_cached + self.num_used == self.num_blocks

    def _evict(self, count: int) -> list[int]:
        # The one place where prefixes are lost, unless somebody saves them.
        cached, digests, by_digest = self._cached, self._digests, self._by_digest
        blocks: list[int] = []
        lost: list[bytes] = []
        for _ in range(count):
            block, _ = cached.popitem(last=False)
            digest = digests[block]
            assert digest is not None
            del by_digest[digest]
            digests[block] = None
            blocks.append(block)
            lost.append(digest)
        if self.on_evict is not None:
            self.on_evict(blocks, lost)
        return blocks
