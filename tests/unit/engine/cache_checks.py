"""What must hold of every KV cache between two calls."""

from __future__ import annotations

from collections import Counter

from eft_serve.engine.block_pool import BLOCK_SIZE, blocks_for
from eft_serve.engine.kv_cache import KVCache


def assert_consistent(cache: KVCache) -> None:
    """Every block is free, cached or referenced, as often as sequences hold it; digests name what is there."""
    pool = cache.pool
    holders = Counter(block for sequence in cache for block in sequence.block_ids)
    assert sorted([*holders, *pool._free, *pool._cached]) == list(range(1, pool.num_blocks + 1))
    assert all(pool.num_references(block) == holders[block] for block in range(pool.num_blocks + 1))
    assert cache.used_tokens == len(holders) * BLOCK_SIZE
    assert {block: digest for digest, block in pool._blocks.items()} == pool._digests
    assert pool._digests.keys() >= pool._cached.keys()
    assert pool._digests.keys().isdisjoint(pool._free)
    for sequence in cache:
        num_full = sequence.num_computed_tokens // BLOCK_SIZE
        assert len(sequence.block_ids) == blocks_for(sequence.num_computed_tokens)
        assert len(set(sequence.block_ids)) == len(sequence.block_ids)
        assert all(holders[b] == 1 and b not in pool._digests for b in sequence.block_ids[num_full:])
        if sequence.digests:
            named = cache._digests.of_blocks(sequence.digests[0], sequence.token_ids)
            assert list(named) == sequence.digests[1:]
            found = [pool._digests.get(b) for b in sequence.block_ids[:num_full]]
            assert all(digest in (None, own) for digest, own in zip(found, sequence.digests[1:], strict=True))
