"""Intervals: known values, pairing, and what has no meaning."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eft_serve.evaluation.statistics import (
    Column,
    difference,
    normalised,
    perplexity,
    perplexity_ratio,
    ratio,
    share,
)


def flags(num_set: int, total: int) -> Column:
    return np.array([1.0] * num_set + [0.0] * (total - num_set))


@pytest.mark.parametrize(
    ("num_set", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (417, 468, 0.8595, 0.9161)],
)
def test_a_share_has_wilsons_interval(num_set: int, total: int, low: float, high: float) -> None:
    estimate = share(flags(num_set, total))
    assert estimate.value == num_set / total
    assert estimate[1:] == pytest.approx((low, high), abs=6e-5)


def test_nothing_has_no_share() -> None:
    with pytest.raises(ValueError, match="flags"):
        share(flags(0, 0))
    with pytest.raises(ValueError, match="columns"):
        ratio(flags(0, 0), flags(0, 0))


def test_a_difference_is_that_of_the_means_and_its_interval_is_about_two_standard_errors() -> None:
    ours, theirs = flags(300, 400), flags(200, 400)[::-1].copy()
    estimate = difference(ours, theirs)
    error = (ours - theirs).std() / math.sqrt(400)
    assert estimate.value == pytest.approx(0.25)
    assert (estimate.low, estimate.high) == pytest.approx((0.25 - 1.96 * error, 0.25 + 1.96 * error), abs=0.1 * error)
    assert estimate == difference(ours, theirs)


def test_questions_stay_paired() -> None:
    order = np.random.default_rng(1).permutation(400)
    ours, theirs = flags(300, 400)[order], flags(296, 400)[order]
    paired, shuffled = difference(ours, theirs), difference(ours, np.roll(theirs, 7))
    assert paired.value == shuffled.value == pytest.approx(0.01)
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 4


def test_normalised_is_0_at_the_small_and_1_at_the_large() -> None:
    small, large = flags(100, 400), flags(390, 400)
    zero, one, between = (normalised(each, small, large) for each in (small, large, flags(245, 400)))
    assert zero is not None
    assert one is not None
    assert between is not None
    assert tuple(zero) == (0.0, 0.0, 0.0)
    assert tuple(one) == (1.0, 1.0, 1.0)
    assert between.value == pytest.approx(0.5)
    assert 0.4 < between.low < 0.5 < between.high < 0.6


def test_without_a_gap_nothing_is_normalised() -> None:
    small = flags(398, 400)
    assert normalised(small, small, flags(399, 400)) is None
    assert normalised(small, small, flags(300, 400)) is None


def test_ratios_weigh_answers_by_their_tokens() -> None:
    accepted, lengths = np.array([1.0, 90.0]), np.array([10.0, 100.0])
    assert ratio(accepted, lengths).value == pytest.approx(91 / 110)
    assert perplexity(accepted, lengths).value == pytest.approx(math.exp(91 / 110))
    assert perplexity_ratio(accepted, 2 * accepted, lengths).value == pytest.approx(math.exp(-91 / 110))
    low, high = perplexity(accepted, lengths)[1:]
    assert (low, high) == pytest.approx((math.exp(0.1), math.exp(0.9)))
