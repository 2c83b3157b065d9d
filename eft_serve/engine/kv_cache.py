"""Which sequence holds which blocks, and what is in them: accounting only; knows no tensors, no model and no clock.

A sequence holds whole blocks in token order. A full block is named by a digest of its tokens, of all tokens before
them and of the sequence's salt and adapter, so equal names mean equal keys and values, and a prefix that was computed
once is found again. Shared blocks are full and only read: a sequence writes after what it shares, or into a copy of
its own.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from eft_serve.engine.batch import Copy
from eft_serve.engine.block_pool import BLOCK_SIZE, BlockPool, blocks_for


def token_array(token_ids: Iterable[int] = ()) -> array[int]:
    """Of int64, so that its bytes are what is hashed."""
    return array("q", token_ids)


@dataclass(slots=True)
class Sequence:
    """One model's KV-bearing state of one request."""

    sequence_id: str
    token_ids: array[int] = field(default_factory=token_array)  # int64; those whose keys and values are in the cache
    block_ids: list[int] = field(default_factory=list)  # may reach beyond the computed tokens while a step runs
    digests: list[bytes] = field(default_factory=list)  # of the root, then of each full block; empty: not shared
    adapter: str | None = None  # that computes it; None: the model as it is
    last_step_time: float = 0.0  # seconds on the engine's clock

    @property
    def num_computed_tokens(self) -> int:
        return len(self.token_ids)


class Digests:
    """Names of blocks by content, which cannot be computed without this process's key."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of_root(self, salt: str, adapter: str | None) -> bytes:
        """The parent of the first block of every sequence with this salt and adapter."""
        root = repr((salt, adapter)).encode()
        return blake2b(root, digest_size=16, key=self._key, person=b"root").digest()

    def of_blocks(self, parent: bytes, token_ids: array[int]) -> Iterator[bytes]:
        """The digest of each full block of `token_ids`, which follow the block (or the root) called `parent`."""
        for stop in range(BLOCK_SIZE, len(token_ids) + 1, BLOCK_SIZE):
            block = parent + token_ids[stop - BLOCK_SIZE : stop].tobytes()
            parent = blake2b(block, digest_size=16, key=self._key, person=b"block").digest()
            yield parent


class KVCache:
    """All sequences and the blocks they hold, least recently stepped first."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.copies: list[Copy] = []  # that the next forward has to make first; until then no source is written
        self._sequences: OrderedDict[str, Sequence] = OrderedDict()
        self._digests = Digests()

    @property
    def capacity_tokens(self) -> int:
        return self.pool.num_blocks * BLOCK_SIZE

    @property
    def used_tokens(self) -> int:
        """Tokens' worth of blocks that sequences hold."""
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
            sequence = self._sequences[sequence_id] = Sequence(sequence_id)
        self._sequences.move_to_end(sequence_id)
        sequence.last_step_time = now
        return sequence

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forget every token from `num_tokens` on and release the blocks that no longer hold any.

        Rows will be written from there on. If that is inside a block, the block must be the sequence's own: it is
        copied when others hold it too, and forgotten as well when there is no room for a copy.
        """
        num_computed = sequence.num_computed_tokens
        if num_tokens >= num_computed and blocks_for(num_computed) == len(sequence.block_ids):
            return  # nothing to forget, and the block that is written next has always been the sequence's own
        num_tokens = min(num_tokens, num_computed)
        num_full, num_left = divmod(num_tokens, BLOCK_SIZE)
        if num_left and not self._own(sequence, num_full):
            num_tokens -= num_left
        keep = blocks_for(num_tokens)
        self.pool.release(sequence.block_ids[keep:])
        del sequence.block_ids[keep:], sequence.token_ids[num_tokens:], sequence.digests[1 + num_full :]

    def _own(self, sequence: Sequence, index: int) -> bool:
        """Make this block the sequence's alone, and not findable; false when there is no room for a copy."""
        source = sequence.block_ids[index]
        if self.pool.num_references(source) == 1:
            self.pool.unregister(source)
            return True
        if not self.pool.num_free:
            return False
        (target,) = self.pool.allocate(1)
        self.pool.release([source])
        sequence.block_ids[index] = target
        self.copies.append((source, target))
        return True

    def forget_copies(self) -> None:
        """Copies may not have been made: sequences that rely on one forget what they hold from there on."""
        targets = {target for _, target in self.copies}
        self.copies = []
        for sequence in self:
            if not targets.isdisjoint(sequence.block_ids):
                first = next(i for i, block_id in enumerate(sequence.block_ids) if block_id in targets)
                self.truncate(sequence, first * BLOCK_SIZE)

    def match_prefix(
        self, sequence: Sequence, salt: str | None, token_ids: list[int], adapter: str | None = None
    ) -> None:
        """Give an empty sequence its salt and adapter, and the blocks of the longest known prefix of `token_ids`."""
        sequence.adapter = adapter
        sequence.digests = [] if salt is None else [self._digests.of_root(salt, adapter)]
        if salt is None:
            return
        tokens = token_array(token_ids)
        for digest in self._digests.of_blocks(sequence.digests[0], tokens):
            block_id = self.pool.share(digest)
            if block_id is None:
                break
            sequence.block_ids.append(block_id)
            sequence.digests.append(digest)
        sequence.token_ids = tokens[: len(sequence.block_ids) * BLOCK_SIZE]

    def commit(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Count tokens as computed; from now on the blocks that they fill can be found by others of the root."""
        sequence.token_ids.extend(token_ids)
        if not sequence.digests:
            return
        num_named = len(sequence.digests) - 1
        if len(sequence.token_ids) < (num_named + 1) * BLOCK_SIZE:
            return
        unnamed = sequence.token_ids[num_named * BLOCK_SIZE :]
        for index, digest in enumerate(self._digests.of_blocks(sequence.digests[-1], unnamed), num_named):
            self.pool.register(sequence.block_ids[index], digest)
            sequence.digests.append(digest)

    def forget_prefix(self, sequence: Sequence) -> None:
        """The sequence's blocks are never found by others, now or later: what was computed is not reliable."""
        for block_id in sequence.block_ids:
            self.pool.unregister(block_id)
        sequence.digests.clear()

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that are missing for the sequence to hold `num_tokens`, beyond its own and the free ones."""
        return blocks_for(num_tokens) - len(sequence.block_ids) - self.pool.num_free

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence blocks for `num_tokens`; the caller has checked `num_missing_blocks`."""
        sequence.block_ids += self.pool.allocate(max(0, blocks_for(num_tokens) - len(sequence.block_ids)))

    def free(self, sequence_id: str) -> None:
        """Drop a sequence and release its blocks; nothing happens when it is not here."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self.pool.release(sequence.block_ids)

    def blocks_of(self, sequence_ids: Collection[str]) -> set[int]:
        """Blocks that at least one of these sequences holds."""
        return {block_id for s in self if s.sequence_id in sequence_ids for block_id in s.block_ids}

    def stepped_before(self, time: float) -> list[str]:
        """Sequences whose last step was earlier than `time`."""
        return [s.sequence_id for s in self if s.last_step_time < time]
