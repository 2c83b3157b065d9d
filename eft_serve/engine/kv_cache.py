"""Who holds which blocks of the KV cache: accounting only; knows no tensors, no model and no clock of its own.

The budget is cut into blocks of `BLOCK_SIZE` tokens. Block 0 belongs to nobody: it stays zero and pads ragged rows, so
that no sequence's data is ever read for another. A sequence owns whole blocks in token order; a future prefix cache
would share them by a reference count here, without changing what a sequence or a batch looks like.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import count

BLOCK_SIZE = 16  # tokens
NULL_BLOCK = 0


def blocks_for(num_tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """The free blocks. Ids run from 1; `NULL_BLOCK` is never handed out."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, NULL_BLOCK, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has checked `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def release(self, block_ids: list[int]) -> None:
        self._free.extend(reversed(block_ids))


@dataclass(slots=True)
class Sequence:
    """One model's KV-bearing state of one request."""

    sequence_id: str
    number: int  # never given twice, also when a sequence of this id begins anew
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    block_ids: list[int] = field(default_factory=list)  # may reach beyond the computed tokens while a step runs
    last_step_time: float = 0.0  # seconds on the engine's clock


class KVCache:
    """All sequences and the blocks they own, least recently stepped first."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self._sequences: OrderedDict[str, Sequence] = OrderedDict()
        self._numbers = count(1)

    @property
    def capacity_tokens(self) -> int:
        return self.pool.num_blocks * BLOCK_SIZE

    @property
    def used_tokens(self) -> int:
        """Tokens' worth of blocks that are taken."""
        return (self.pool.num_blocks - self.pool.num_free) * BLOCK_SIZE

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def get(self, sequence_id: str) -> Sequence | None:
        return self._sequences.get(sequence_id)

    def touch(self, sequence_id: str, now: float) -> Sequence:
        """The sequence, created when new, as the most recently stepped one."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            sequence = self._sequences[sequence_id] = Sequence(sequence_id, next(self._numbers))
        self._sequences.move_to_end(sequence_id)
        sequence.last_step_time = now
        return sequence

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forget every token from `num_tokens` on and give back the blocks that no longer hold any."""
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, num_tokens)
        keep = blocks_for(sequence.num_computed_tokens)
        self.pool.release(sequence.block_ids[keep:])
        del sequence.block_ids[keep:]

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to find before the sequence can hold `num_tokens`, beyond its own and the free ones."""
        return blocks_for(num_tokens) - len(sequence.block_ids) - self.pool.num_free

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence blocks for `num_tokens`; the caller has checked `num_missing_blocks`."""
        sequence.block_ids += self.pool.allocate(max(0, blocks_for(num_tokens) - len(sequence.block_ids)))

    def free(self, sequence_id: str) -> None:
        """Drop a sequence and its blocks; nothing happens when it is not here."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self.pool.release(sequence.block_ids)

    def least_recently_stepped(self, excluding: Collection[str]) -> str | None:
        """The sequence to evict first, or None when all that own blocks are excluded."""
        candidates = (s.sequence_id for s in self if s.block_ids and s.sequence_id not in excluding)
        return next(candidates, None)

    def stepped_before(self, time: float) -> list[str]:
        """Sequences whose last step was earlier than `time`."""
        return [s.sequence_id for s in self if s.last_step_time < time]
