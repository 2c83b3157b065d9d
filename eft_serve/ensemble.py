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
from eft_serve.config_recipes import (
    AS_ITSELF,
    DRAFTERS,
    Interval,
    PromptConfig,
    RecipeConfig,
    RoleConfig,
    ToolFormat,
    TunedConfig,
)
from eft_serve.errors import InvalidRequestError
from eft_serve.types import Combination, Reward, Speculative, Term, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """A request's own values of its recipe's knobs; None keeps the recipe's value."""

    scale: float | None = None  # beta
    weights: Mapping[str, float] | None = None  # alpha by fine-tuning; missing ones keep the recipe's value
    truncate_top_p: float | None = None


OWN_KNOBS = Knobs()
Prompted = Mapping[int, str]  # place of a role in the recipe → the name under which the request gives its prompt
UNPROMPTED: Prompted = {}


@dataclass(frozen=True, slots=True)
class Part:
    """What a term is: a model with its prompt settings, and which of the request's prompts it reads."""

    role: RoleConfig
    prompt: str | None = None  # the name of the role that it is given for; None: the request's own

    @property
    def is_plain(self) -> bool:
        """Whether it reads the request's own prompt as the model itself defines."""
        return self.prompt is None and self.role.prompting == AS_ITSELF


@dataclass(frozen=True, slots=True)
class Ensemble:
    """What the `model` of a request names: a recipe, or one plain model."""

    name: str
    models: tuple[str, ...]  # every model that it may run, base first
    recipe: RecipeConfig | None = None  # None: a plain model
    adapted: Mapping[str, str] = field(default_factory=dict)  # adapter → the deployment that computes it
    tool_parser: ToolFormat | None = None  # None: no tools

    @classmethod
    def find(cls, config: AppConfig, name: str) -> Ensemble | None:
        """The recipe or plain model of this name; None when there is neither."""
        recipe = config.recipes.get(name)
        if recipe is None and name not in config.models:
            return None
        models = recipe.models if recipe else (name,)
        adapted = {model: config.deployment_of(model) for model in models if model not in config.deployments}
        return cls(name, models, recipe, adapted, (recipe or config.models[name]).tool_parser)

    def resolve(self, knobs: Knobs = OWN_KNOBS, *, prompted: Prompted = UNPROMPTED, every: bool = False) -> Combination:
        """The combination for these knobs, see `resolve_recipe`; a plain model is its only term and takes no knobs."""
        if self.recipe is not None:
            combination = resolve_recipe(self.recipe, knobs, prompted=prompted, every=every)
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

    def prompted(self, prompts: Mapping[str, object]) -> Prompted:
        """Which role reads which of these prompts, each given for the role of its name.

        Equal prompts count as the first of them, so that roles that are equal stay one term.

        Raises:
            InvalidRequestError: a name is of no role, or of one that the recipe gives no prompt of a request.
        """
        names = {} if self.recipe is None else self.recipe.role_names
        permitted = frozenset[int]() if self.recipe is None else self.recipe.promptable
        found: dict[int, str] = {}
        for name, prompt in prompts.items():
            if (place := names.get(name)) not in permitted or place in found:
                raise InvalidRequestError(f"eft.prompts.{name}: {self._refusal(name)}", param=f"eft.prompts.{name}")
            found[place] = next(other for other, given in prompts.items() if given == prompt)
        return found

    def _refusal(self, name: str) -> str:
        if self.recipe is None:
            return f"model {self.name!r} is a plain model, which has no roles; name a recipe, or leave out eft"
        names, permitted = self.recipe.role_names, self.recipe.promptable
        if name in names and names[name] in permitted:
            return "this role is given a prompt under another name too; leave one of them out"
        known = [name for name, place in names.items() if place in permitted]
        kind = "its prompt is fixed by this recipe" if name in names else "is not a role of this recipe"
        return f"{kind}; a request may prompt {known or 'none of its roles'}"

    def parts(self, prompted: Prompted = UNPROMPTED) -> dict[str, Part]:
        """What each possible term is, by the term's name."""
        if self.recipe is None:
            return {self.name: Part(RoleConfig(model=self.name))}
        return {name: part for part, name in term_names(self.recipe, prompted).items()}

    @property
    def prompting(self) -> dict[str, PromptConfig]:
        """How each possible term is prompted where the request has one prompt for all, by the term's name."""
        return {name: part.role.prompting for name, part in self.parts().items()}

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


def resolve_recipe(
    recipe: RecipeConfig, knobs: Knobs = OWN_KNOBS, *, prompted: Prompted = UNPROMPTED, every: bool = False
) -> Combination:
    """The recipe with these knobs; their bounds are checked here and nowhere later.

    Terms are in the recipe's order. Their coefficients sum to 1, so at least one is not 0.

    Args:
        recipe: the models, and the knobs' default values and bounds.
        knobs: None, or a weight not named: the recipe's value.
        prompted: roles that read a prompt of their own; those that are equal but for it are terms of their own.
        every: include the terms with coefficient 0, and the rewards, which need every term.

    Raises:
        InvalidRequestError: a knob is out of bounds, or a weight is not of a fine-tuning of the recipe.
    """
    weights = _weights(recipe, knobs)
    beta = _within(knobs.scale, recipe.scale, recipe.bounds.scale, "eft.scale")
    bounds = recipe.bounds.truncate_top_p
    truncate_top_p = _within(knobs.truncate_top_p, recipe.truncate_top_p, bounds, "eft.truncate_top_p")
    names = term_names(recipe, prompted)
    base, reference, *others = _parts(recipe, prompted)
    tuned, own_references = others[: len(weights)], iter(others[len(weights) :])
    total: dict[Part, float] = defaultdict(float)
    total[base] += beta
    total[reference] -= beta
    ratio = dict(total) if truncate_top_p < 1 else {}
    total[reference] += 1.0
    brought: dict[Part, float] = defaultdict(float)
    rewards = []
    for part, (each, alpha) in zip(tuned, weights, strict=True):
        its_reference = reference if each.reference is None else next(own_references)
        total[part] += alpha
        brought[part] += alpha
        total[its_reference] -= alpha
        rewards.append(Reward(each.knob, names[part], names[its_reference], alpha))
    terms = (
        Term(
            name,
            part.role.model,
            rounded(total[part]),
            weight=brought.get(part, 0.0),
            ratio=rounded(ratio.get(part, 0.0)),
        )
        for part, name in names.items()
    )
    running = tuple(term for term in terms if every or term.counts)
    return Combination(running, truncate_top_p, tuple(rewards) if every else ())


def term_names(recipe: RecipeConfig, prompted: Prompted = UNPROMPTED) -> dict[Part, str]:
    """Every term that the recipe may run, named after its model, or `model@role` for a prompt other than its own.

    Roles with equal model and prompt are one term.
    """
    names: dict[Part, str] = {}
    parts = _parts(recipe, prompted)
    by_model = {model: {part for part in parts if part.role.model == model} for model in recipe.models}
    for (label, _), part in zip(recipe.roles, parts, strict=True):
        model = part.role.model
        names.setdefault(part, model if len(by_model[model]) == 1 or part.is_plain else f"{model}@{label}")
    return names


def _parts(recipe: RecipeConfig, prompted: Prompted) -> list[Part]:
    """Every role of the recipe, in its order."""
    return [Part(role.role, prompted.get(place)) for place, (_, role) in enumerate(recipe.roles)]


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
