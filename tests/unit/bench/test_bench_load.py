"""The load of a serving benchmark."""

from __future__ import annotations

import pytest

from eft_serve.bench.load import OUTPUT_TOKENS, PROMPT_TOKENS, Prompts, burst, poisson_load


def test_a_seed_is_the_load() -> None:
    assert poisson_load(5, 2.0, seed=3) == poisson_load(5, 2.0, seed=3)
    assert poisson_load(5, 2.0, seed=3) != poisson_load(5, 2.0, seed=4)


def test_arrivals_are_in_order_from_0_at_the_rate() -> None:
    arrivals = [wanted.arrival_s for wanted in poisson_load(200, 10.0, seed=0)]
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(20.0, rel=0.3)


def test_a_rate_scales_the_same_arrivals() -> None:
    slow, fast = poisson_load(5, 1.0, seed=0), poisson_load(5, 4.0, seed=0)
    assert [w.arrival_s for w in slow] == pytest.approx([4 * w.arrival_s for w in fast])
    assert [w.prompt for w in slow] == [w.prompt for w in fast]


def test_lengths_are_mixed_within_their_ranges() -> None:
    load = poisson_load(60, 1.0, seed=0)
    for lengths, (low, high) in (
        ([len(w.prompt) for w in load], PROMPT_TOKENS),
        ([w.num_tokens for w in load], OUTPUT_TOKENS),
    ):
        assert low <= min(lengths) < low + (high - low) / 4
        assert high - (high - low) / 4 < max(lengths) <= high


def test_no_two_prompts_begin_with_the_same_block() -> None:
    prompts = [w.prompt for seed in (1000, 1001) for w in poisson_load(60, 1.0, seed)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == len(prompts)


def test_prompts_are_as_long_as_asked_and_all_of_text() -> None:
    source = Prompts(0)
    assert [len(source.take(length)) for length in (1, 16, 2000)] == [1, 16, 2000]
    assert len(set(source.take(500))) > 50


def test_a_burst_is_the_same_mix_at_once() -> None:
    assert [w.arrival_s for w in burst(3, seed=5)] == [0.0] * 3
    assert [w.prompt for w in burst(3, seed=5)] == [w.prompt for w in poisson_load(3, 1.0, seed=5)]
