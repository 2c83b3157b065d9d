"""Chunks are sized by what steps took."""

from __future__ import annotations

import random
import statistics

import pytest

from eft_serve.coordinator.pacing import FIRST_CHUNK, PLAIN_EVERY, SMALLEST_CHUNK, Pacer

DECODE_S = 0.010
TOKEN_S = 0.0001


def steps(pacer: Pacer, count: int, decode_s: float = DECODE_S, token_s: float = TOKEN_S) -> list[float]:
    """Mixed steps with as large a chunk as allowed, a plain decode between two; what the mixed ones took."""
    taken = []
    for _ in range(count):
        pacer.observe(decode_s, 0)
        chunk = pacer.chunk
        taken.append(decode_s + chunk * token_s)
        pacer.observe(taken[-1], chunk)
    return taken


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 3.0])
def test_a_mixed_step_takes_so_many_times_a_decode(slowdown: float) -> None:
    pacer = Pacer(slowdown, most=4096)
    taken = steps(pacer, 10)
    assert taken[-1] == pytest.approx(slowdown * DECODE_S, rel=0.02)


def test_before_anything_is_known_chunks_are_small() -> None:
    pacer = Pacer(2.0, most=4096)
    assert pacer.chunk == FIRST_CHUNK
    pacer.observe(1.0, 500)  # nothing to compare with
    assert pacer.chunk == FIRST_CHUNK
    assert Pacer(2.0, most=8).chunk == 8


def test_chunks_stay_between_the_smallest_and_the_most() -> None:
    slow, quick = Pacer(2.0, most=512), Pacer(2.0, most=512)
    steps(slow, 50, token_s=1.0)
    steps(quick, 200, token_s=1e-9)
    assert slow.chunk == SMALLEST_CHUNK
    assert quick.chunk == 512


def test_decodes_that_became_slower_do_not_starve_prefills() -> None:
    """More requests decode than when the pace was learnt, and every step has prefills to do."""
    pacer = Pacer(2.0, most=4096)
    steps(pacer, 20)
    for _ in range(100):
        chunk = pacer.chunk
        pacer.observe(5 * DECODE_S + chunk * TOKEN_S, chunk)
    chunks = []
    for _ in range(PLAIN_EVERY):
        chunks.append(pacer.chunk)
        pacer.observe(5 * DECODE_S + pacer.chunk * TOKEN_S, pacer.chunk)
    assert chunks.count(0) == 1
    assert max(chunks) == pytest.approx(5 * DECODE_S / TOKEN_S, rel=0.2)


def test_a_prefill_that_may_be_cached_does_not_change_the_pace() -> None:
    pacer = Pacer(2.0, most=4096)
    steps(pacer, 20)
    before = pacer.chunk
    for _ in range(5):
        pacer.observe(DECODE_S, 512, maybe_cached=True)
    assert pacer.chunk == before


def test_one_slow_step_is_forgiven() -> None:
    pacer = Pacer(2.0, most=4096)
    steps(pacer, 20)
    before = pacer.chunk
    pacer.observe(5 * DECODE_S, before)
    steps(pacer, 30)
    assert pacer.chunk == pytest.approx(before, rel=0.05)


def test_noise_does_not_run_away() -> None:
    rng = random.Random(0)
    pacer = Pacer(2.0, most=4096)
    chunks = []
    for _ in range(300):
        decode_s = DECODE_S * rng.choice([1.0, 1.0, 1.0, 1.0, 2.0])  # somebody else on the machine
        pacer.observe(decode_s, 0)
        chunks.append(pacer.chunk)
        pacer.observe(DECODE_S * rng.choice([1.0, 1.0, 1.0, 1.0, 2.0]) + pacer.chunk * TOKEN_S, pacer.chunk)
    assert 0.5 * DECODE_S / TOKEN_S < statistics.median(chunks) < 2 * DECODE_S / TOKEN_S
    assert min(chunks[10:]) > 2 * SMALLEST_CHUNK
