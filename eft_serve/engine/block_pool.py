"""The blocks of the KV budget: who refers to them, and which can be found again; knows no tokens and no sequences.

Ids run from 1. Block 0 belongs to no sequence: it stays zero and pads ragged rows, so that no sequence's data is ever
read for another. A block that is full may be registered under a digest of its content. When the last reference to a
registered block goes, it is *cached*: free, and found by its digest until a sequence needs the room. So a block is
always one of free, cached and referenced.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 16  # tokens
NULL_BLOCK = 0


def blocks_for(num_tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """References to blocks, and digests of their contents."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._references = [0] * (num_blocks + 1)
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones among them."""
        return len(self._free) + len(self._cached)

    def num_references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for writing, cached ones last; the caller has checked `num_free`."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked, {self.num_free} free")
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def share(self, digest: bytes) -> int | None:
        """One more reference to the block with this content, for reading; None when there is no such block."""
        block_id = self._blocks.get(digest)
        if block_id is not None:
            self._cached.pop(block_id, None)
            self._references[block_id] += 1
        return block_id

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one reference to each, the last first: a prefix is worth more than what follows it."""
        for block_id in reversed(block_ids):
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if block_id in self._digests:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def register(self, block_id: int, digest: bytes) -> None:
        """Let a referenced block be found by its content; of blocks with equal content, the first is the one found."""
        if digest not in self._blocks:
            self._blocks[digest] = block_id
            self._digests[block_id] = digest

    def unregister(self, block_id: int) -> None:
        """This block is no longer found; nothing happens when it was not registered."""
        digest = self._digests.pop(block_id, None)
        if digest is not None:
            del self._blocks[digest]

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self.unregister(block_id)
        return block_id
