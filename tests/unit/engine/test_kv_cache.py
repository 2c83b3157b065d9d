"""Blocks are neither lost nor owned twice, whatever happens."""

from __future__ import annotations

from cache_checks import assert_consistent
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eft_serve.engine.block_pool import BLOCK_SIZE, NULL_BLOCK
from eft_serve.engine.kv_cache import KVCache

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
            self.cache.commit(sequence, [1] * (num_tokens - sequence.num_computed_tokens))

    @precondition(lambda self: len(self.cache) > 0)
    @rule(name=names, num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE))
    def roll_back(self, name: str, num_tokens: int) -> None:
        sequence = self.cache.get(name)
        if sequence is not None:
            self.cache.truncate(sequence, num_tokens)
            assert sequence.num_computed_tokens <= num_tokens

    @rule(name=names)
    def free(self, name: str) -> None:
        self.cache.free(name)
        assert self.cache.get(name) is None

    @invariant()
    def blocks_are_conserved(self) -> None:
        assert_consistent(self.cache)
        assert NULL_BLOCK not in [block for sequence in self.cache for block in sequence.block_ids]

    @invariant()
    def order_is_least_recently_stepped_first(self) -> None:
        times = [sequence.last_step_time for sequence in self.cache]
        assert times == sorted(times)


TestKVCache = KVCacheMachine.TestCase
