"""Which models a request runs, on which prompts, and with which coefficients in the combined distribution.

EFT (arXiv 2310.12962) is `reference + scale * (base - reference) + sum_i weight_i * (tuned_i - reference_i)`. Collected
by model and prompt, that is one coefficient for each term; a term with coefficient 0 need not run. The ingress
resolves a request's knobs here, once, and the combination travels with the request. This module knows the formula and
the knobs. It does not know logits, tokens or replicas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from eft_serve.config import AppConfig
from eft_serve.config_recipes import AS_ITSELF, DRAFTERS, Interval, PromptConfig, RecipeConfig, RoleConfig, TunedConfig
from eft_serve.errors import InvalidRequestError
from eft_serve.types import Combination, Reward, Speculative, Term, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """A request's own values of its recipe's knobs; None keeps the recipe's value."""

    scale: float | None = None  # beta
    weights: Mapping[str, float] | None = None  # alpha by fine-tuning; missing ones keep the recipe's value
    truncate_top_p: float | None = None


OWN_KNOBS = Knobs()


@dataclass(frozen=True, slots=True)
class Ensemble:
    """What the `model` of a request names: a recipe, or one plain model."""

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

    def resolve(self, knobs: Knobs = OWN_KNOBS, *, every: bool = False) -> Combination:
        """The combination for these knobs, see `resolve_recipe`; a plain model is its only term and takes no knobs."""
        if self.recipe is not None:
            combination = resolve_recipe(self.recipe, knobs, every=every)
        elif knobs == OWN_KNOBS:
            combination = Combination((Term(self.name, self.name, 1.0),))
        else:
            raise InvalidRequestError(
                f"model {self.name!r} is a plain model, which has no knobs; name a recipe, or leave out eft",
                param="eft",
            )
        return replace(combination, terms=tuple(map(self._placed, combination.terms)), recipe=self.name)

    def _placed(self, term: Term) -> Term:
        """The term with its deployment: an adapter's is that of the model that it adapts."""
        deployment = self.adapted.get(term.model)
        return term if deployment is None else replace(term, model=deployment, adapter=term.model)

    @property
    def prompting(self) -> dict[str, PromptConfig]:
        """How each possible term is prompted, by the term's name."""
        if self.recipe is None:
            return {self.name: AS_ITSELF}
        return {name: role.prompting for role, name in term_names(self.recipe).items()}

    def speculative(self, changes: Mapping[str, Any]) -> Speculative:
        """How tokens are drafted: the recipe's settings with these changes; a plain model drafts only if asked to.

        Raises:
            InvalidRequestError: the drafter is not a model of this ensemble.
        """
        draft = changes.get("draft", "auto")
        if draft not in {*DRAFTERS, *self.models}:
            raise InvalidRequestError(
                f"eft.speculative.draft: {draft!r} is not known here; give one of {[*DRAFTERS, *self.models]}",
                param="eft.speculative.draft",
            )
        own = {"draft": "none"} if self.recipe is None else self.recipe.speculative.model_dump()
        return Speculative(**{**own, **changes})


def resolve_recipe(recipe: RecipeConfig, knobs: Knobs = OWN_KNOBS, *, every: bool = False) -> Combination:
    """The recipe with these knobs; their bounds are checked here and nowhere later.

    Terms are in the recipe's order. Their coefficients sum to 1, so at least one is not 0.

    Args:
        recipe: the models, and the knobs' default values and bounds.
        knobs: None, or a weight not named: the recipe's value.
        every: include the terms with coefficient 0, and the rewards, which need every term.

    Raises:
        InvalidRequestError: a knob is out of bounds, or a weight is not of a fine-tuning of the recipe.
    """
    weights = _weights(recipe, knobs)
    beta = _within(knobs.scale, recipe.scale, recipe.bounds.scale, "eft.scale")
    bounds = recipe.bounds.truncate_top_p
    truncate_top_p = _within(knobs.truncate_top_p, recipe.truncate_top_p, bounds, "eft.truncate_top_p")
    names = term_names(recipe)
    total: dict[RoleConfig, float] = defaultdict(float)
    total[recipe.base.role] += beta
    total[recipe.reference.role] -= beta
    ratio = dict(total) if truncate_top_p < 1 else {}
    total[recipe.reference.role] += 1.0
    brought: dict[RoleConfig, float] = defaultdict(float)
    rewards = []
    for each, alpha in weights:
        reference = (each.reference or recipe.reference).role
        total[each.role] += alpha
        brought[each.role] += alpha
        total[reference] -= alpha
        rewards.append(Reward(each.knob, names[each.role], names[reference], alpha))
    terms = (
        Term(
            name,
            role.model,
            rounded(total[role]),
            weight=brought.get(role, 0.0),
            ratio=rounded(ratio.get(role, 0.0)),
        )
        for role, name in names.items()
    )
    running = tuple(term for term in terms if every or term.counts)
    return Combination(running, truncate_top_p, tuple(rewards) if every else ())


def term_names(recipe: RecipeConfig) -> dict[RoleConfig, str]:
    """Every term that the recipe may run, named after its model, or `model@role` for a prompt other than its own.

    Roles with equal model and prompt are one term.
    """
    names: dict[RoleConfig, str] = {}
    roles = [(label, role.role) for label, role in recipe.roles]
    prompts = {model: {role for _, role in roles if role.model == model} for model in recipe.models}
    for label, role in roles:
        plain = len(prompts[role.model]) == 1 or role.prompting == AS_ITSELF
        names.setdefault(role, role.model if plain else f"{role.model}@{label}")
    return names


def _weights(recipe: RecipeConfig, knobs: Knobs) -> list[tuple[TunedConfig, float]]:
    """Every fine-tuning with its weight for this request."""
    asked, known = knobs.weights or {}, [each.knob for each in recipe.tuned]
    if unknown := sorted(set(asked) - set(known)):
        raise InvalidRequestError(
            f"eft.weights: {unknown[0]!r} is not among this recipe's fine-tunings {known}", param="eft.weights"
        )
    return [
        (each, _within(asked.get(each.knob), each.weight, recipe.bounds.weight(each.knob), f"eft.weights.{each.knob}"))
        for each in recipe.tuned
    ]


def _within(asked: float | None, own: float, bounds: Interval, param: str) -> float:
    """The value for this request; NaN is within no bounds."""
    if asked is None:
        return own
    low, high = bounds
    if not low <= asked <= high:
        raise InvalidRequestError(f"{param}: {asked} is outside this recipe's bounds, {low:g} to {high:g}", param=param)
    return float(asked)
