"""The parts that ask and grade: the grid of scales, the helpful/harmless frontier, the knobs, truncation.

Each takes a `Lab` and returns plain data: estimates are [value, low, high].
"""

from __future__ import annotations

from typing import Any

import torch

from eft_serve.evaluation.lab import Lab
from eft_serve.evaluation.statistics import difference, normalised, share
from eft_serve.numerics.truncate import truncate_weights
from eft_serve.zoo.evaluate import SHORT_TOKENS
from eft_serve.zoo.generate import Family, Recipe, alone

GRID_MEASURES = ("correct", "helpful form", "long helpful form")
FORM_MEASURES = ("correct", "helpful form")
FRONTIER_MEASURES = ("harmful declined", "helpful form", "correct", "declined")
LAMBDAS = tuple(step / 10 for step in range(11))
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
NUCLEI = (0.99, 0.95, 0.9, 0.8)
TRUNCATED_SCALES = (1.0, 1.5)


def grid(lab: Lab) -> dict[str, Any]:
    """Pre-training scale against fine-tuning scale, raw and normalised (0: both small, 1: both large)."""
    cells = lab.systems.grid
    both_small, both_large = cells["small", "small"], cells["large", "large"]
    systems = {
        "base-small": alone(lab.systems.small),
        "base-large": alone(lab.systems.large),
        **{f"pre-training {base}, fine-tuning {tuned}": recipe for (base, tuned), recipe in cells.items()},
    }
    for questions in ("short", "long"):
        lab.ask(systems.values(), questions)
    mixed = {"up-scaled": cells["large", "small"], "down-scaled": cells["small", "large"]}
    return {
        "shares": {name: lab.shares(recipe, GRID_MEASURES) for name, recipe in systems.items()},
        "gap": {measure: lab.gain(both_large, both_small, measure) for measure in GRID_MEASURES},
        "gain": {
            name: {measure: lab.gain(recipe, both_small, measure) for measure in GRID_MEASURES}
            for name, recipe in mixed.items()
        },
        "normalised": {
            name: {
                measure: normalised(*(lab.flags(each, measure) for each in (recipe, both_small, both_large)))
                for measure in GRID_MEASURES
            }
            for name, recipe in mixed.items()
        },
    }


def frontier(lab: Lab) -> dict[str, Any]:
    """Helpful weight λ and harmless weight 1 - λ, on the small base and up-scaled."""
    curves = {
        name: {helpful: lab.systems.interpolated(helpful, base) for helpful in LAMBDAS}
        for name, base in (("small", lab.systems.small), ("up-scaled", lab.systems.large))
    }
    for questions in ("short", "harmful"):
        lab.ask([recipe for curve in curves.values() for recipe in curve.values()], questions)
    small, large = curves["small"], curves["up-scaled"]
    return {
        "curves": {
            name: {f"{helpful:g}": lab.shares(recipe, FRONTIER_MEASURES) for helpful, recipe in curve.items()}
            for name, curve in curves.items()
        },
        "gain": {
            f"{helpful:g}": {
                measure: lab.gain(large[helpful], small[helpful], measure) for measure in FRONTIER_MEASURES
            }
            for helpful in LAMBDAS
        },
    }


def knobs(lab: Lab) -> dict[str, Any]:
    """Scale and weight, and the control without a reference; each beside EFT with both at 1."""
    eft = lab.systems.up_scaled()
    series: dict[str, dict[str, Recipe]] = {
        "scale": {f"{scale:g}": lab.systems.up_scaled(scale=scale) for scale in SCALES},
        "weight": {f"{weight:g}": lab.systems.up_scaled(weight=weight) for weight in WEIGHTS},
        "control": {f"{weight:g}": lab.systems.without_reference(weight) for weight in (0.5, 1.0)},
    }
    lab.ask([recipe for each in series.values() for recipe in each.values()], "short")
    return {
        name: {
            knob: {
                "shares": lab.shares(recipe, FORM_MEASURES),
                "gain": {measure: lab.gain(recipe, eft, measure) for measure in FORM_MEASURES},
            }
            for knob, recipe in each.items()
        }
        for name, each in series.items()
    }


def truncation(lab: Lab) -> dict[str, Any]:
    """The paper's conservative decoding: the up-scaling ratio counts only in the tuned model's nucleus."""
    messages = [question.text for question in lab.questions["short"]]
    result: dict[str, Any] = {}
    for scale in TRUNCATED_SCALES:
        plain = lab.systems.up_scaled(scale)
        rows = {"none": {"shares": lab.shares(plain, FORM_MEASURES)}}
        for top_p in NUCLEI:
            texts = _Truncating(lab, scale, top_p).greedy(plain, messages, SHORT_TOKENS, rows=64)
            flags = {measure: lab.grade(measure, texts) for measure in FORM_MEASURES}
            rows[f"{top_p:g}"] = {
                "shares": {measure: share(column) for measure, column in flags.items()},
                "gain": {m: difference(column, lab.flags(plain, m)) for m, column in flags.items()},
            }
        result[f"{scale:g}"] = rows
    return result


class _Truncating(Family):
    """The zoo's naive decoding, which lets the combination be replaced: the decode loop has none but the plain one."""

    def __init__(self, lab: Lab, scale: float, top_p: float) -> None:
        super().__init__(lab.checkpoints)
        self._systems, self._scale, self._top_p = lab.systems, scale, top_p

    def next_logprobs(self, recipe: Recipe, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        roles = (self._systems.tuned_small, self._systems.large, self._systems.small)
        tuned, base, reference = [super(_Truncating, self).next_logprobs(alone(role), ids, mask) for role in roles]
        scale, top_p = torch.full((len(ids),), self._scale), torch.full((len(ids),), self._top_p)
        return truncate_weights(tuned, base, reference, scale, top_p)
