"""Chunks are sized by what steps took."""

from __future__ import annotations

import random

import pytest

from eft_serve.coordinator.pacing import FIRST_CHUNK, SMALLEST_CHUNK, Pacer

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


def test_a_cached_prefix_among_real_prefills_hardly_makes_chunks_larger() -> None:
    pacer = Pacer(2.0, most=4096)
    steps(pacer, 20)
    before = pacer.chunk
    pacer.observe(DECODE_S, 512)  # found, not computed
    assert before <= pacer.chunk < 1.1 * before
    pacer.observe(DECODE_S + 10 * TOKEN_S * 512, 512)
    assert pacer.chunk < before / 2, "a slow one counts at once"


def test_noise_does_not_run_away() -> None:
    rng = random.Random(0)
    pacer = Pacer(2.0, most=4096)
    for _ in range(300):
        steps(pacer, 1, DECODE_S * rng.uniform(0.8, 1.5), TOKEN_S * rng.uniform(0.7, 1.5))
        assert pacer.chunk <= 1.6 * DECODE_S / TOKEN_S
    assert pacer.chunk >= 0.4 * DECODE_S / TOKEN_S
