"""A verdict needs the whole interval on one side."""

from __future__ import annotations

import pytest

from eft_serve.evaluation.claims import FAILS, HOLDS, UNDECIDED, UNDEFINED, Claim


@pytest.mark.parametrize(
    ("estimate", "above", "verdict"),
    [
        ([0.7, 0.6, 0.8], True, HOLDS),
        ([0.7, 0.6, 0.8], False, FAILS),
        ([0.3, 0.2, 0.4], True, FAILS),
        ([0.3, 0.2, 0.4], False, HOLDS),
        ([0.7, 0.5, 0.8], True, UNDECIDED),
        ([0.3, 0.2, 0.5], True, UNDECIDED),
        ([0.5, 0.5, 0.5], True, UNDECIDED),
        (None, True, UNDEFINED),
    ],
)
def test_verdicts(estimate: list[float] | None, above: bool, verdict: str) -> None:
    claim = Claim("A figure", lambda figures: figures["x"], 0.5, above=above)
    assert claim.verdict({"x": estimate}) == verdict
