"""What the method claims, and whether a family's figures support it.

A verdict needs the whole interval on one side of the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eft_serve.evaluation.statistics import Estimate

Figures = Mapping[str, Any]  # one family's, by part

HOLDS, FAILS, UNDECIDED, UNDEFINED = "holds", "**does not hold**", "undecided", "no gap to measure"


@dataclass(frozen=True)
class Claim:
    """A figure, and the side of a threshold where it has to lie."""

    text: str
    figure: Callable[[Figures], Sequence[float] | None]  # value, low, high; None where there is nothing to measure
    threshold: float
    above: bool = True

    @property
    def wanted(self) -> str:
        return f"{'>' if self.above else '<'} {self.threshold:g}"

    def measured(self, figures: Figures) -> Estimate | None:
        found = self.figure(figures)
        return None if found is None else Estimate(*found)

    def verdict(self, figures: Figures) -> str:
        measured = self.measured(figures)
        if measured is None:
            return UNDEFINED
        over, under = measured.low > self.threshold, measured.high < self.threshold
        if not over and not under:
            return UNDECIDED
        return HOLDS if over == self.above else FAILS


def _best(rows: Mapping[str, Any], knobs: Sequence[str]) -> Sequence[float]:
    """The largest gain in correctness of these knobs."""
    return max((rows[knob]["gain"]["correct"] for knob in knobs), key=lambda estimate: float(estimate[0]))


def _amplified(figures: Figures) -> Sequence[float]:
    scale = figures["knobs"]["scale"]
    return _best(scale, [knob for knob in scale if float(knob) > 1])


def _truncated(figures: Figures, scale: str) -> Sequence[float]:
    rows = figures["truncation"][scale]
    return _best(rows, [top_p for top_p in rows if top_p != "none"])


def _least_correct_gain(figures: Figures) -> Sequence[float]:
    gains = figures["frontier"]["gain"].values()
    return min((gain["correct"] for gain in gains), key=lambda estimate: float(estimate[1]))


CLAIMS = (
    Claim(
        "Up-scaling (large pre-training, small fine-tuning) answers more correctly than the small tuned model",
        lambda f: f["grid"]["gain"]["up-scaled"]["correct"],
        0.0,
    ),
    Claim(
        "Scaling pre-training alone recovers most of the gap in factual accuracy",
        lambda f: f["grid"]["normalised"]["up-scaled"]["correct"],
        0.5,
    ),
    Claim(
        "Scaling fine-tuning alone recovers less than half of that gap",
        lambda f: f["grid"]["normalised"]["down-scaled"]["correct"],
        0.5,
        above=False,
    ),
    Claim(
        "Scaling fine-tuning alone recovers most of the gap in helpfulness (short answers)",
        lambda f: f["grid"]["normalised"]["down-scaled"]["helpful form"],
        0.5,
    ),
    Claim(
        "The same on long answers",
        lambda f: f["grid"]["normalised"]["down-scaled"]["long helpful form"],
        0.5,
    ),
    Claim(
        "On the helpful/harmless frontier, up-scaling answers more correctly at every λ (the least gain)",
        _least_correct_gain,
        0.0,
    ),
    Claim("Amplification (the best scale above 1) answers more correctly than scale 1", _amplified, 0.0),
    Claim(
        "The reference helps: without it (the control) fewer answers are correct",
        lambda f: f["knobs"]["control"]["1"]["gain"]["correct"],
        0.0,
        above=False,
    ),
    Claim("Truncation (the best p) answers more correctly at scale 1", lambda f: _truncated(f, "1"), 0.0),
    Claim("Truncation (the best p) answers more correctly at scale 1.5", lambda f: _truncated(f, "1.5"), 0.0),
    Claim(
        "Most tokens of EFT's answers move little: share with a total variation below 0.1 at temperature 1",
        lambda f: f["tokens"]["1"]["share_near"],
        0.5,
    ),
    Claim(
        "The large tuned model's answers are likelier under EFT than under the small tuned model (perplexity ratio)",
        lambda f: f["perplexity"]["the large tuned model's answers"]["over_tuned_small"]["EFT"],
        1.0,
        above=False,
    ),
)
