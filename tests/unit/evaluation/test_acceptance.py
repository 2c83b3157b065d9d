"""Total variation and acceptance against values written out by hand or by brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eft_serve.evaluation.acceptance import (
    coupled_acceptance,
    drawn_acceptance,
    tokens_per_verification,
    total_variation,
)


def distributions(seed: int, rows: int = 4, size: int = 7, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft, target = torch.randn(2, rows, size, generator=generator, dtype=torch.float64) * spread
    return draft.softmax(-1), target.softmax(-1)


def brute_force_coupling(p: list[float], q: list[float]) -> float:
    tokens = range(len(p))
    return sum(1 / sum(max(p[j] / p[i], q[j] / q[i]) for j in tokens) for i in tokens)


def test_total_variation_is_the_largest_difference_of_any_event() -> None:
    draft, target = distributions(0)
    for p, q, measured in zip(draft.tolist(), target.tolist(), total_variation(draft, target).tolist(), strict=True):
        events = range(2 ** len(p))
        best = max(abs(sum((p[t] - q[t]) for t in range(len(p)) if event >> t & 1)) for event in events)
        assert measured == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_coupled_acceptance_is_the_sum_written_out(seed: int) -> None:
    draft, target = distributions(seed)
    expected = [brute_force_coupling(p, q) for p, q in zip(draft.tolist(), target.tolist(), strict=True)]
    assert coupled_acceptance(draft, target).tolist() == pytest.approx(expected)


def test_keyed_draws_agree_as_often_as_expected() -> None:
    draft, target = distributions(5, rows=200, size=50)
    positions = torch.arange(200)
    drawn = drawn_acceptance(draft.log().float(), target.log().float(), positions, range(40))
    assert len(drawn.unique()) > 2  # seeds differ
    assert float(drawn.mean()) == pytest.approx(float(coupled_acceptance(draft, target).mean()), abs=0.02)


@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 6.0]))
def test_no_coupling_beats_the_classic_one(seed: int, spread: float) -> None:
    draft, target = distributions(seed, spread=spread)
    assert (coupled_acceptance(draft, target) <= 1 - total_variation(draft, target) + 1e-9).all()
    assert coupled_acceptance(draft, draft).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("agrees", "block", "steps"),
    [
        ([True] * 10, 4, 2),  # four and one more, twice
        ([False] * 3, 4, 3),
        ([True, True, False, True, True, True], 4, 2),
        ([True, True, False, True, True, True], 1, 4),
        ([], 4, 0),
    ],
)
def test_a_verification_yields_what_was_accepted_and_one_more(agrees: list[bool], block: int, steps: int) -> None:
    assert tokens_per_verification(agrees, block) == (len(agrees), steps)
