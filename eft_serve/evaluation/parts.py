"""The parts that ask and grade: the grid of scales, the helpful/harmless frontier, the knobs, truncation.

Each takes an `Experiment` and returns plain data: estimates are [value, low, high].
"""

from __future__ import annotations

from typing import Any

from eft_serve.evaluation.experiment import Experiment
from eft_serve.evaluation.statistics import normalised
from eft_serve.evaluation.systems import alone
from eft_serve.types import Combination

GRID_MEASURES = ("correct", "helpful form", "long helpful form")
FORM_MEASURES = ("correct", "helpful form")
FRONTIER_MEASURES = ("harmful declined", "helpful form", "correct", "declined")
LAMBDAS = tuple(step / 10 for step in range(11))
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
NUCLEI = (1.0, 0.99, 0.95, 0.9, 0.8)
TRUNCATED_SCALES = (1.0, 1.5)


def grid(experiment: Experiment) -> dict[str, Any]:
    """Pre-training scale against fine-tuning scale, raw and normalised (0: both small, 1: both large)."""
    cells = experiment.systems.grid
    both_small, both_large = cells["small", "small"], cells["large", "large"]
    systems = {
        "base-small": alone(experiment.systems.small),
        "base-large": alone(experiment.systems.large),
        **{f"pre-training {base}, fine-tuning {tuned}": system for (base, tuned), system in cells.items()},
    }
    for questions in ("short", "long"):
        experiment.ask(systems.values(), questions)
    mixed = {"up-scaled": cells["large", "small"], "down-scaled": cells["small", "large"]}
    return {
        "shares": {name: experiment.shares(system, GRID_MEASURES) for name, system in systems.items()},
        "gap": {measure: experiment.gain(both_large, both_small, measure) for measure in GRID_MEASURES},
        "gain": {
            name: {measure: experiment.gain(system, both_small, measure) for measure in GRID_MEASURES}
            for name, system in mixed.items()
        },
        "normalised": {
            name: {
                measure: normalised(*(experiment.flags(each, measure) for each in (system, both_small, both_large)))
                for measure in GRID_MEASURES
            }
            for name, system in mixed.items()
        },
    }


def frontier(experiment: Experiment) -> dict[str, Any]:
    """Helpful weight λ and harmless weight 1 - λ, on the small base and up-scaled."""
    curves = {
        name: {helpful: experiment.systems.interpolated(helpful, base) for helpful in LAMBDAS}
        for name, base in (("small", experiment.systems.small), ("up-scaled", experiment.systems.large))
    }
    for questions in ("short", "harmful"):
        experiment.ask([system for curve in curves.values() for system in curve.values()], questions)
    small, large = curves["small"], curves["up-scaled"]
    return {
        "curves": {
            name: {f"{helpful:g}": experiment.shares(system, FRONTIER_MEASURES) for helpful, system in curve.items()}
            for name, curve in curves.items()
        },
        "gain": {
            f"{helpful:g}": {
                measure: experiment.gain(large[helpful], small[helpful], measure) for measure in FRONTIER_MEASURES
            }
            for helpful in LAMBDAS
        },
    }


def knobs(experiment: Experiment) -> dict[str, Any]:
    """Scale and weight, and the control without a reference; each beside EFT with both at 1."""
    eft = experiment.systems.up_scaled()
    series: dict[str, dict[str, Combination]] = {
        "scale": {f"{scale:g}": experiment.systems.up_scaled(scale=scale) for scale in SCALES},
        "weight": {f"{weight:g}": experiment.systems.up_scaled(weight=weight) for weight in WEIGHTS},
        "control": {f"{weight:g}": experiment.systems.without_reference(weight) for weight in (0.5, 1.0)},
    }
    experiment.ask([system for each in series.values() for system in each.values()], "short")
    return {
        name: {
            knob: {
                "shares": experiment.shares(system, FORM_MEASURES),
                "gain": {measure: experiment.gain(system, eft, measure) for measure in FORM_MEASURES},
            }
            for knob, system in each.items()
        }
        for name, each in series.items()
    }


def truncation(experiment: Experiment) -> dict[str, Any]:
    """The paper's conservative decoding: the up-scaling ratio counts only in the tuned model's nucleus."""
    eft = experiment.systems.up_scaled()
    series = {
        scale: {top_p: experiment.systems.up_scaled(scale, truncate_top_p=top_p) for top_p in NUCLEI}
        for scale in TRUNCATED_SCALES
    }
    experiment.ask([system for each in series.values() for system in each.values()], "short")
    return {
        f"{scale:g}": {
            "none" if top_p == 1 else f"{top_p:g}": {
                "shares": experiment.shares(system, FORM_MEASURES),
                "gain": {measure: experiment.gain(system, each[1.0], measure) for measure in FORM_MEASURES},
                "correct_over_eft": experiment.gain(system, eft, "correct"),
            }
            for top_p, system in each.items()
        }
        for scale, each in series.items()
    }
