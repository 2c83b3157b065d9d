"""The page is what the template and the recorded figures give."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from eft_serve.evaluation import page
from eft_serve.evaluation.claims import CLAIMS
from eft_serve.evaluation.plots import PANELS
from eft_serve.evaluation.suite import PARTS
from eft_serve.zoo import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "results.md"


@pytest.fixture
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PAGE.with_suffix("") / page.FIGURES_NAME).read_text(encoding="utf-8"))
    return found


def test_the_page_is_written_from_the_recorded_figures(figures: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page.render(figures)


def test_every_figure_of_the_page_comes_from_the_record(figures: dict[str, Any]) -> None:
    changed = deepcopy(figures)
    changed["grid"]["llama"]["gain"]["up-scaled"]["correct"] = [-0.123, -0.234, -0.012]
    rendered = page.render(changed)
    assert "-12.3 (-23.4 to -1.2)" in rendered
    assert "| > 0 | -0.12 (-0.23 to -0.01) | **does not hold** |" in rendered


def test_all_parts_of_all_families_were_run_on_all_questions(figures: dict[str, Any]) -> None:
    assert figures["questions"] == {"short": 468, "long": 48, "harmful": 156}
    assert set(PARTS) == set(page.SECTIONS) == set(PANELS)
    for part in PARTS:
        assert list(figures[part]) == list(FAMILIES)
        assert (PAGE.with_suffix("") / f"{part}.png").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_figures_show_the_headline(figures: dict[str, Any], family: str) -> None:
    own = {part: figures[part][family] for part in PARTS}
    assert CLAIMS[0].verdict(own) == "holds"
    assert page.headline(figures)[family]["up_scaled_gain"] == own["grid"]["gain"]["up-scaled"]["correct"]
