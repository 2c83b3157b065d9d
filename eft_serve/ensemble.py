"""Which models a request runs, and with which coefficient in the combined distribution.

EFT (arXiv 2310.12962) is `reference + scale * (base - reference) + sum_i weight_i * (tuned_i - reference_i)`. Collected
by model, that is one coefficient per model; a model whose coefficient is zero need not run. This module knows the
formula and the knobs. It does not know logits, tokens or replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eft_serve.config import DRAFTERS, MAX_KNOB, AppConfig, RecipeConfig
from eft_serve.errors import InvalidRequestError
from eft_serve.types import Speculative

ZERO = 1e-9  # a smaller coefficient is rounding left over from knobs that cancel


@dataclass(frozen=True, slots=True)
class Term:
    """One next-token distribution of the combination: a model that reads a prompt."""

    name: str  # unique in its ensemble, and what its prompt is filed under
    model: str  # the deployment that computes it
    coefficient: float  # of its log-probabilities in the combination
    adapter: str | None = None  # of that deployment; None: the model as it is
    weight: float = 0.0  # alpha of the fine-tuning that it brings; 0 for the others
    ratio: float = 0.0  # the part of the coefficient that truncation confines to the nucleus

    @property
    def standing(self) -> float:
        """The other part: its coefficient outside the nucleus."""
        rest = self.coefficient - self.ratio
        return rest if abs(rest) >= ZERO else 0.0


@dataclass(frozen=True, slots=True)
class Ensemble:
    """What the `model` of a request names: a recipe, or one plain model that stands alone."""

    name: str
    models: tuple[str, ...]  # every model that it may run, base first
    recipe: RecipeConfig | None = None  # None: a plain model

    @classmethod
    def find(cls, config: AppConfig, name: str) -> Ensemble | None:
        """The recipe or plain model of this name; None when there is neither."""
        if recipe := config.recipes.get(name):
            return cls(name, recipe.models, recipe)
        return cls(name, (name,)) if name in config.models else None

    def terms(self, scale: float | None = None, weights: Mapping[str, float] | None = None) -> tuple[Term, ...]:
        """What runs for these knobs, see `coefficients`; a plain model is itself alone and takes no knobs."""
        if self.recipe is not None:
            found = coefficients(self.recipe, scale, weights)
            alphas = {t.model: t.weight for t in self.recipe.tuned} | dict(weights or {})
            return tuple(Term(model, model, c, weight=alphas.get(model, 0.0)) for model, c in found.items())
        if scale is not None or weights is not None:
            raise InvalidRequestError(
                f"model {self.name!r} is a plain model without scale and weights; name a recipe, or leave out eft",
                param="eft",
            )
        return (Term(self.name, self.name, 1.0),)

    def speculative(self, changes: Mapping[str, Any]) -> Speculative:
        """How tokens are guessed ahead: the recipe's settings with these changes. A plain model guesses when told to.

        Raises:
            InvalidRequestError: the drafter is nobody that this ensemble may run.
        """
        draft = changes.get("draft", "auto")
        if draft not in {*DRAFTERS, *self.models}:
            raise InvalidRequestError(
                f"eft.speculative.draft: {draft!r} is not known here; give one of {[*DRAFTERS, *self.models]}",
                param="eft.speculative.draft",
            )
        own = {"draft": "none"} if self.recipe is None else self.recipe.speculative.model_dump()
        return Speculative(**{**own, **changes})


def coefficients(
    recipe: RecipeConfig, scale: float | None = None, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The coefficient of every model that runs, in the recipe's order. They sum to 1, so there is always one.

    Args:
        recipe: names the models and the knobs' defaults.
        scale: beta; None for the recipe's own.
        weights: alpha by tuned model; those not named keep the recipe's own.

    Raises:
        InvalidRequestError: a knob is not finite or beyond `MAX_KNOB`, or a weight names no tuned model of the recipe.
    """
    weights = weights or {}
    tuned = [t.model for t in recipe.tuned]
    if unknown := sorted(set(weights) - set(tuned)):
        raise InvalidRequestError(
            f"eft.weights: {unknown[0]!r} is not a tuned model of this recipe; those are {tuned}", param="eft.weights"
        )
    beta = recipe.scale if scale is None else _checked(scale, "eft.scale")
    total = dict.fromkeys(recipe.models, 0.0)
    total[recipe.base] += beta
    total[recipe.reference] += 1.0 - beta
    for each in recipe.tuned:
        alpha = _checked(weights[each.model], "eft.weights") if each.model in weights else each.weight
        total[each.model] += alpha
        total[each.reference or recipe.reference] -= alpha
    return {model: c for model, c in total.items() if abs(c) >= ZERO}


def _checked(knob: float, param: str) -> float:
    if not math.isfinite(knob) or abs(knob) > MAX_KNOB:
        raise InvalidRequestError(f"{param}: {knob} must be a number from -{MAX_KNOB:g} to {MAX_KNOB:g}", param=param)
    return float(knob)
