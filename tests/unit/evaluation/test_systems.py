"""The arithmetic of the grid and of the interpolation."""

from __future__ import annotations

import pytest

from eft_serve.evaluation.systems import Systems
from eft_serve.types import Combination

SYSTEMS = Systems.of("llama")


def coefficients(system: Combination) -> dict[str, float]:
    return {term.model: round(term.coefficient, 9) for term in system.terms}


def test_the_grid_takes_knowledge_from_one_scale_and_behaviour_from_the_other() -> None:
    assert {cell: coefficients(system) for cell, system in SYSTEMS.grid.items()} == {
        ("small", "small"): {"tuned-small": 1.0},
        ("large", "small"): {"base-large": 1.0, "tuned-small": 1.0, "base-small": -1.0},
        ("small", "large"): {"base-small": 1.0, "tuned-large": 1.0, "base-large": -1.0},
        ("large", "large"): {"tuned-large": 1.0},
    }


def test_the_other_family_has_the_same_grid() -> None:
    falcon = Systems.of("falcon").grid["large", "small"]
    assert coefficients(falcon) == {"falcon-base-large": 1.0, "falcon-tuned-small": 1.0, "falcon-base-small": -1.0}


@pytest.mark.parametrize(
    ("helpful", "base", "expected"),
    [
        (0.0, "base-small", {"tuned-small-harmless": 1.0}),
        (1.0, "base-small", {"tuned-small": 1.0}),
        (0.3, "base-small", {"tuned-small": 0.3, "tuned-small-harmless": 0.7}),
        (1.0, "base-large", {"base-large": 1.0, "tuned-small": 1.0, "base-small": -1.0}),
        (0.3, "base-large", {"base-large": 1.0, "tuned-small": 0.3, "tuned-small-harmless": 0.7, "base-small": -1.0}),
    ],
)
def test_interpolation_shares_one_reference(helpful: float, base: str, expected: dict[str, float]) -> None:
    assert coefficients(SYSTEMS.interpolated(helpful, base)) == expected


def test_truncation_confines_the_up_scaling_only() -> None:
    truncated = SYSTEMS.up_scaled(1.5, truncate_top_p=0.9)
    assert truncated.truncate_top_p == 0.9
    assert {term.model: (term.unscaled, term.ratio) for term in truncated.terms} == {
        "base-large": (0.0, 1.5),
        "base-small": (0.0, -1.5),
        "tuned-small": (1.0, 0.0),
    }


def test_the_control_has_no_reference() -> None:
    assert coefficients(SYSTEMS.without_reference(0.5)) == {"base-large": 1.0, "tuned-small": 0.5}
