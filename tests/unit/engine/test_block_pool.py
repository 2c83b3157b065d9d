"""What is handed out, what is found again, and what goes first."""

from __future__ import annotations

import pytest

from eft_serve.engine.block_pool import BLOCK_SIZE, BlockPool, blocks_for

A, B, C = b"a", b"b", b"c"


def registered(pool: BlockPool, *digests: bytes) -> list[int]:
    """A chain of allocated blocks of these contents."""
    block_ids = pool.allocate(len(digests))
    for block_id, digest in zip(block_ids, digests, strict=True):
        pool.register(block_id, digest)
    return block_ids


def test_asking_for_more_than_is_free_is_an_error_and_takes_nothing() -> None:
    pool = BlockPool(3)
    with pytest.raises(ValueError, match="4 blocks asked, 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (0, 1, BLOCK_SIZE, BLOCK_SIZE + 1)] == [0, 1, 1, 2]


def test_a_cached_block_is_free_and_found_until_it_is_needed() -> None:
    pool = BlockPool(2)
    (block,) = registered(pool, A)
    pool.release([block])
    assert pool.num_free == 2
    assert pool.share(A) == block
    assert pool.num_free == 1
    pool.release([block])
    pool.allocate(2)
    assert pool.share(A) is None


def test_a_block_stays_taken_until_its_last_reference_goes() -> None:
    pool = BlockPool(1)
    (block,) = registered(pool, A)
    assert pool.share(A) == block
    pool.release([block])
    assert (pool.num_references(block), pool.num_free) == (1, 0)
    pool.release([block])
    assert (pool.num_references(block), pool.num_free) == (0, 1)


def test_unregistered_blocks_go_first_then_the_tail_of_the_chain_released_longest_ago() -> None:
    pool = BlockPool(5)
    first, second = registered(pool, A, B), registered(pool, C)
    plain = pool.allocate(2)
    for chain in (first, second, plain):
        pool.release(chain)
    assert set(pool.allocate(2)) == set(plain)
    assert pool.allocate(3) == [first[1], first[0], second[0]]


def test_being_found_again_makes_a_block_recent() -> None:
    pool = BlockPool(2)
    old, new = registered(pool, A, B)
    pool.release([old])
    pool.release([new])
    assert pool.share(A) == old
    pool.release([old])
    assert pool.allocate(1) == [new]


def test_the_first_block_of_equal_content_is_the_one_found() -> None:
    pool = BlockPool(2)
    (first,), (second,) = registered(pool, A), registered(pool, A)
    pool.release([second])
    assert pool.share(A) == first
    assert pool.allocate(1) == [second], "it was free at once"


def test_an_unregistered_block_is_not_found_and_is_not_cached() -> None:
    pool = BlockPool(1)
    (block,) = registered(pool, A)
    pool.unregister(block)
    pool.unregister(block)
    assert pool.share(A) is None
    pool.release([block])
    assert (pool.num_free, len(pool._cached)) == (1, 0)
