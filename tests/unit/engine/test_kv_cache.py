"""Blocks are neither lost nor owned twice, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eft_serve.engine.kv_cache import BLOCK_SIZE, NULL_BLOCK, BlockPool, KVCache, blocks_for

NUM_BLOCKS = 7
names = st.sampled_from("abcd")


class KVCacheMachine(RuleBasedStateMachine):
    """Random touches, reservations, computations, rollbacks and frees."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(NUM_BLOCKS)
        self.now = 0.0

    @rule(name=names, num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE))
    def step(self, name: str, num_tokens: int) -> None:
        self.now += 1
        sequence = self.cache.touch(name, self.now)
        if self.cache.num_missing_blocks(sequence, num_tokens) <= 0:
            self.cache.reserve(sequence, num_tokens)
            sequence.num_computed_tokens = max(sequence.num_computed_tokens, num_tokens)

    @precondition(lambda self: len(self.cache) > 0)
    @rule(name=names, num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE))
    def roll_back(self, name: str, num_tokens: int) -> None:
        sequence = self.cache.get(name)
        if sequence is not None:
            self.cache.truncate(sequence, num_tokens)
            assert sequence.num_computed_tokens <= num_tokens
            assert len(sequence.block_ids) == blocks_for(sequence.num_computed_tokens)

    @rule(name=names)
    def free(self, name: str) -> None:
        self.cache.free(name)
        assert self.cache.get(name) is None

    @invariant()
    def blocks_are_conserved(self) -> None:
        owned = [block for sequence in self.cache for block in sequence.block_ids]
        assert NULL_BLOCK not in owned
        assert sorted([*owned, *self.cache.pool._free]) == list(range(1, NUM_BLOCKS + 1))
        assert self.cache.used_tokens == len(owned) * BLOCK_SIZE

    @invariant()
    def computed_tokens_have_blocks(self) -> None:
        assert all(len(s.block_ids) >= blocks_for(s.num_computed_tokens) for s in self.cache)

    @invariant()
    def order_is_least_recently_stepped_first(self) -> None:
        times = [sequence.last_step_time for sequence in self.cache]
        assert times == sorted(times)


TestKVCache = KVCacheMachine.TestCase


def test_asking_for_more_than_is_free_is_an_error_and_takes_nothing() -> None:
    pool = BlockPool(3)
    with pytest.raises(ValueError, match="4 blocks asked, 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (0, 1, BLOCK_SIZE, BLOCK_SIZE + 1)] == [0, 1, 1, 2]
