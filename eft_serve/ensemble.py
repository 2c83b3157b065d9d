"""Which models a request runs, on which prompts, and with which coefficients in the combined distribution.

EFT (arXiv 2310.12962) is `reference + scale * (base - reference) + sum_i weight_i * (tuned_i - reference_i)`. Collected
by model and prompt, that is one coefficient for each term; a term that counts for nothing need not run. This module
knows the formula and the knobs. It does not know logits, tokens or replicas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from eft_serve.config import AppConfig
from eft_serve.config_recipes import AS_ITSELF, DRAFTERS, Interval, PromptConfig, RecipeConfig, RoleConfig, TunedConfig
from eft_serve.errors import InvalidRequestError
from eft_serve.types import OWN_KNOBS, Knobs, Speculative

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
    prompting: PromptConfig = AS_ITSELF  # what its prompt has that others have not

    @property
    def counts(self) -> bool:
        """Whether it changes the combination; one that does not runs only to be looked at."""
        return bool(self.coefficient or self.ratio)

    @property
    def unscaled(self) -> float:
        """The other part: its coefficient outside the nucleus."""
        return _rounded(self.coefficient - self.ratio)


@dataclass(frozen=True, slots=True)
class Reward:
    """What a fine-tuning has made likelier: log π_tuned − log π_reference, the reward that it implies."""

    name: str  # what its weight is called
    tuned: str  # names of terms
    reference: str
    weight: float


@dataclass(frozen=True, slots=True)
class Ensemble:
    """What the `model` of a request names: a recipe, or one plain model that stands alone."""

    name: str
    models: tuple[str, ...]  # every model that it may run, base first
    recipe: RecipeConfig | None = None  # None: a plain model
    adapted: Mapping[str, str] = field(default_factory=dict)  # adapter → the deployment that computes it

    @classmethod
    def find(cls, config: AppConfig, name: str) -> Ensemble | None:
        """The recipe or plain model of this name; None when there is neither."""
        recipe = config.recipes.get(name)
        if recipe is None and name not in config.models:
            return None
        models = recipe.models if recipe else (name,)
        adapted = {model: config.deployment_of(model) for model in models if model not in config.deployments}
        return cls(name, models, recipe, adapted)

    def terms(self, knobs: Knobs = OWN_KNOBS, *, every: bool = False) -> tuple[Term, ...]:
        """What runs for these knobs, see `recipe_terms`; a plain model is itself alone and takes no knobs."""
        if self.recipe is not None:
            return tuple(map(self._placed, recipe_terms(self.recipe, knobs, every=every)))
        if knobs != OWN_KNOBS:
            raise InvalidRequestError(
                f"model {self.name!r} is a plain model, which has no knobs; name a recipe, or leave out eft",
                param="eft",
            )
        return (self._placed(Term(self.name, self.name, 1.0)),)

    def _placed(self, term: Term) -> Term:
        """The term where it is computed: an adapter's in the deployment of the model that it adapts."""
        deployment = self.adapted.get(term.model)
        return term if deployment is None else replace(term, model=deployment, adapter=term.model)

    def rewards(self, knobs: Knobs = OWN_KNOBS) -> tuple[Reward, ...]:
        """Those of the recipe's fine-tunings, in its order, over the names of `terms` with `every`; a plain model has
        none. Raises as `recipe_terms`."""
        if self.recipe is None:
            return ()
        names, shared = term_names(self.recipe), self.recipe.reference
        return tuple(
            Reward(each.knob, names[each.role], names[(each.reference or shared).role], alpha)
            for each, alpha in _weights(self.recipe, knobs)
        )

    def truncate_top_p(self, knobs: Knobs = OWN_KNOBS) -> float:
        """The nucleus that the terms' ratios are confined to; 1 does not confine them."""
        return 1.0 if self.recipe is None else _truncate_top_p(self.recipe, knobs)

    def speculative(self, changes: Mapping[str, Any]) -> Speculative:
        """How tokens are drafted: the recipe's settings with these changes. A plain model draft tokens when told to.

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


def recipe_terms(recipe: RecipeConfig, knobs: Knobs = OWN_KNOBS, *, every: bool = False) -> tuple[Term, ...]:
    """Every term that counts for something, in the recipe's order. Their coefficients sum to 1, so there is always one.

    Args:
        recipe: names the models and the knobs' own values and bounds.
        knobs: None, or a weight not named: the recipe's own.
        every: also the terms that count for nothing.

    Raises:
        InvalidRequestError: a knob is out of its bounds, or a weight names no fine-tuning of the recipe.
    """
    weights = _weights(recipe, knobs)
    beta = _within(knobs.scale, recipe.scale, recipe.bounds.scale, "eft.scale")
    total: dict[RoleConfig, float] = defaultdict(float)
    total[recipe.base.role] += beta
    total[recipe.reference.role] -= beta
    ratio = dict(total) if _truncate_top_p(recipe, knobs) < 1 else {}
    total[recipe.reference.role] += 1.0
    brought: dict[RoleConfig, float] = defaultdict(float)
    for each, alpha in weights:
        total[each.role] += alpha
        brought[each.role] += alpha
        total[(each.reference or recipe.reference).role] -= alpha
    terms = (
        Term(
            name,
            role.model,
            _rounded(total[role]),
            weight=brought.get(role, 0.0),
            ratio=_rounded(ratio.get(role, 0.0)),
            prompting=role.prompting,
        )
        for role, name in term_names(recipe).items()
    )
    return tuple(term for term in terms if every or term.counts)


def term_names(recipe: RecipeConfig) -> dict[RoleConfig, str]:
    """Every term that the recipe may run: the model's name, and its first role too where another prompt is the plain
    one. Roles of equal model and prompt are one term."""
    names: dict[RoleConfig, str] = {}
    roles = [(label, role.role) for label, role in recipe.roles]
    prompts = {model: {role for _, role in roles if role.model == model} for model in recipe.models}
    for label, role in roles:
        plain = len(prompts[role.model]) == 1 or role.prompting == AS_ITSELF
        names.setdefault(role, role.model if plain else f"{role.model}@{label}")
    return names


def _weights(recipe: RecipeConfig, knobs: Knobs) -> list[tuple[TunedConfig, float]]:
    """Every fine-tuning with the weight that holds."""
    asked, known = knobs.weights or {}, [each.knob for each in recipe.tuned]
    if unknown := sorted(set(asked) - set(known)):
        raise InvalidRequestError(
            f"eft.weights: {unknown[0]!r} is not a fine-tuning of this recipe; those are {known}", param="eft.weights"
        )
    return [
        (each, _within(asked.get(each.knob), each.weight, recipe.bounds.weight(each.knob), f"eft.weights.{each.knob}"))
        for each in recipe.tuned
    ]


def _truncate_top_p(recipe: RecipeConfig, knobs: Knobs) -> float:
    bounds = recipe.bounds.truncate_top_p
    return _within(knobs.truncate_top_p, recipe.truncate_top_p, bounds, "eft.truncate_top_p")


def _within(asked: float | None, own: float, bounds: Interval, param: str) -> float:
    """The value that holds; NaN is within no bounds."""
    if asked is None:
        return own
    low, high = bounds
    if not low <= asked <= high:
        raise InvalidRequestError(f"{param}: {asked} is outside this recipe's bounds, {low:g} to {high:g}", param=param)
    return float(asked)


def _rounded(coefficient: float) -> float:
    return coefficient if abs(coefficient) >= ZERO else 0.0
