"""PrefixCache: which blocks already hold the beginning of a sequence, by chained hashes of their tokens.

Owns the digests and when a block gets one; it does not know requests, rows or policies. The digest of block i is the full
SHA-256 of (digest of block i - 1, its tokens as little-endian int32), the chain begins with the hash of the salt, so that
tenants with different salts never meet. A digest names the whole prefix up to the end of its block.

Invariant: a published block is full, its tokens are known on the host and its KV was written by a step that has completed;
nobody writes into it again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from octavo.engine.blocks import BlockPool
from octavo.plan import Int32

_sha256 = hashlib.sha256


def root_digest(salt: str) -> bytes:
    """Where the chain of a salt begins."""
    return _sha256(b"octavo prefix " + salt.encode("utf-8", "surrogatepass")).digest()


class PrefixCache:
    """Finds and publishes prefixes in a pool.

    Args:
        pool: the device blocks. block_size: tokens of a block. enabled: False matches and publishes nothing.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool) -> None:
        self.pool = pool
        self.block_size = block_size
        self.enabled = enabled

    def extend(self, digests: list[bytes], root: bytes, tokens: Int32) -> None:
        """Append to ``digests`` those of the full blocks of ``tokens`` that it lacks."""
        if not self.enabled:
            return
        size, have = self.block_size, len(digests)
        count = len(tokens) // size
        if have >= count:
            return
        raw = tokens[have * size : count * size].astype("<i4", copy=False).tobytes()
        parent = digests[-1] if digests else root
        for at in range(0, len(raw), 4 * size):
            parent = _sha256(parent + raw[at : at + 4 * size]).digest()
            digests.append(parent)

    def match(self, digests: Sequence[bytes], num_tokens: int) -> list[int]:
        """Blocks that hold the beginning of a sequence of ``num_tokens``, without taking a reference.

        Its last token is never among them: it has to be computed for its logits, and a shared block is not written into.
        """
        found: list[int] = []
        if self.enabled:
            find = self.pool.find
            for digest in digests[: (num_tokens - 1) // self.block_size]:
                block = find(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def holds(self, digests: Sequence[bytes], num_tokens: int) -> bool:
        """True when the full block that begins at ``num_tokens`` of a sequence is here."""
        index = num_tokens // self.block_size
        return self.enabled and index < len(digests) and self.pool.find(digests[index]) is not None

    def publish(self, digests: list[bytes], root: bytes, tokens: Int32, blocks: Int32, start: int, end: int) -> None:
        """Publish blocks [start, end) of a sequence; the caller has seen that they are full, known and written.

        Args:
            digests: of the sequence; extended as needed. tokens: of the sequence. blocks: its table.
        """
        if len(digests) < end:
            self.extend(digests, root, tokens[: end * self.block_size])
        publish = self.pool.publish
        for index in range(start, end):
            publish(int(blocks[index]), digests[index])

    def publish_each(
        self, chains: Sequence[tuple[list[bytes], bytes]], tokens: Int32, blocks: npt.NDArray[np.int32]) -> None:
        """Publish one block of each of several sequences, the common case while they decode.

        Args:
            chains: (digests, root) of each; the block is the one after its digests.
            tokens: int32 [sequences, block_size] of those blocks. blocks: int32 [sequences].
        """
        raw, size = tokens.astype("<i4", copy=False).tobytes(), 4 * self.block_size
        publish, at = self.pool.publish, 0
        for (digests, root), block in zip(chains, blocks.tolist(), strict=True):
            digest = _sha256((digests[-1] if digests else root) + raw[at : at + size]).digest()
            at += size
            digests.append(digest)
            publish(block, digest)
