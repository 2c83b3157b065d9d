"""Recipes: which models are combined, how each is prompted, and the bounds of a request's knobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from eft_serve.config_base import Frozen, Name
from eft_serve.types import MAX_DRAFT_TOKENS

ROLES = ("base", "reference", "tuned")
DRAFTERS = ("auto", "none")  # besides the recipe's own models
MAX_KNOB = 100.0  # far beyond any use; keeps |logit| * knob finite in fp32

Interval = tuple[float, float]
ToolFormat = Literal["hermes", "llama3_json", "mistral"]
"""How a model writes tool calls; vLLM's names of its parsers."""


def _check_interval(interval: Interval) -> Interval:
    if interval[0] > interval[1]:
        raise ValueError(f"{list(interval)}: give the lower bound first")
    return interval


Knob = Annotated[float, Field(ge=-MAX_KNOB, le=MAX_KNOB, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
KnobInterval = Annotated[tuple[Knob, Knob], AfterValidator(_check_interval)]
ProbabilityInterval = Annotated[tuple[Probability, Probability], AfterValidator(_check_interval)]


class PromptConfig(Frozen):
    """How a model is prompted; by default as the model itself defines."""

    chat_template: Path | None = None
    """File of a Jinja chat template; by default the model's own, or a plain format if it has none."""
    system_prompt: str | None = None
    """A system prompt for this model only."""
    response_prefix: str | None = None
    """The beginning of the answer, in this model's prompt only."""


AS_ITSELF = PromptConfig()


class RoleConfig(PromptConfig):
    """A model in one role of a recipe. A bare name is the model with its default prompting."""

    model: Name

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data

    @property
    def role(self) -> RoleConfig:
        """Model and prompt settings only: equal roles give one distribution."""
        return RoleConfig(model=self.model, **dict(self.prompting))

    @property
    def prompting(self) -> PromptConfig:
        """Its prompt settings only."""
        return PromptConfig(**{name: getattr(self, name) for name in PromptConfig.model_fields})


class TunedConfig(RoleConfig):
    """One fine-tuning: the tuned model, and the model that it was tuned from."""

    name: Name | None = None
    """The name of its weight in requests and bounds; by default the model's name."""
    reference: RoleConfig | None = None
    """Default: the recipe's reference."""
    weight: Knob = 1.0
    """alpha: how much of this fine-tuning."""

    @model_validator(mode="after")
    def _is_not_called_a_role(self) -> Self:
        if self.name in ROLES:
            raise ValueError(f"name: {self.name!r} is the name of a role; choose another")
        return self

    @property
    def knob(self) -> str:
        """The name of its weight."""
        return self.name or self.model


class BoundsConfig(Frozen):
    """[lowest, highest] value of a knob in a request; two equal numbers fix it."""

    scale: KnobInterval = (-MAX_KNOB, MAX_KNOB)
    weights: dict[Name, KnobInterval] = Field(default_factory=dict)
    """By fine-tuning; fine-tunings not named are not bounded."""
    truncate_top_p: ProbabilityInterval = (0.0, 1.0)
    prompts: tuple[str, ...] | None = None
    """Roles that a request may give a prompt of their own; None: every role."""

    def weight(self, knob: str) -> Interval:
        """Bounds of one fine-tuning's weight."""
        return self.weights.get(knob, (-MAX_KNOB, MAX_KNOB))


class SpeculativeConfig(Frozen):
    """How a recipe's tokens are drafted (arXiv 2310.12962). No setting changes their distribution."""

    draft: Name = "auto"
    """The drafter: `auto`, the tuned model with the largest weight; `none`, no drafting; or a model of the recipe."""
    num_tokens: int = Field(default=8, ge=1, le=MAX_DRAFT_TOKENS)
    """Draft tokens at a time, at most."""
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    """The drafter goes on while its draft tokens together have this probability; 0 never stops it."""
    overlap: bool = True
    """Draft while draft tokens are verified."""
    disable_by_batch_size: int = Field(default=32, ge=0)
    """No drafting while more requests than this decode: a large batch leaves no device idle."""


class RecipeConfig(Frozen):
    """A named virtual model: `ref + scale * (base - ref) + sum_i weight_i * (tuned_i - ref_i)` (arXiv 2310.12962)."""

    base: RoleConfig
    """The model whose pre-training is wanted."""
    reference: RoleConfig
    """The pre-trained model that the fine-tuning started from."""
    tuned: Annotated[
        tuple[TunedConfig, ...],
        Field(min_length=1),
        BeforeValidator(lambda tuned: [tuned] if isinstance(tuned, str | dict | TunedConfig) else tuned),
    ]
    """The fine-tunings, each with its weight."""
    scale: Knob = 1.0
    """beta: how much of the pre-training scale-up."""
    truncate_top_p: Probability = 1.0
    """The scale-up applies only to tokens in the top-p nucleus of the combination at scale 0; 1: to all tokens."""
    bounds: BoundsConfig = BoundsConfig()
    """Bounds of the knobs in a request."""
    speculative: SpeculativeConfig = SpeculativeConfig()
    """How tokens are drafted."""
    tool_parser: ToolFormat | None = None
    """How its models write tool calls: `hermes` (also Qwen), `llama3_json` or `mistral`; None: no tools."""

    @model_validator(mode="after")
    def _drafter_is_known(self) -> Self:
        if self.speculative.draft not in {*DRAFTERS, *self.models}:
            raise ValueError(
                f"speculative.draft: {self.speculative.draft!r} is not a model of this recipe; give one of "
                f"{[*DRAFTERS, *self.models]}"
            )
        return self

    @model_validator(mode="after")
    def _knobs_have_names(self) -> Self:
        knobs = [t.knob for t in self.tuned]
        if len(set(knobs)) != len(knobs):
            raise ValueError(f"tuned: a name is given twice in {knobs}; give each fine-tuning a name of its own")
        if unknown := sorted(set(self.bounds.weights) - set(knobs)):
            raise ValueError(f"bounds.weights: {unknown[0]!r} is not among the fine-tunings {knobs}")
        return self

    @model_validator(mode="after")
    def _prompted_roles_are_known(self) -> Self:
        known = self.role_names
        if unknown := sorted(set(self.bounds.prompts or ()) - known.keys()):
            raise ValueError(f"bounds.prompts: {unknown[0]!r} is not a role of this recipe; give some of {list(known)}")
        return self

    @model_validator(mode="after")
    def _is_within_its_bounds(self) -> Self:
        own = [("scale", self.scale, self.bounds.scale)]
        own += [(f"the weight of {t.knob}", t.weight, self.bounds.weight(t.knob)) for t in self.tuned]
        own += [("truncate_top_p", self.truncate_top_p, self.bounds.truncate_top_p)]
        for what, value, (low, high) in own:
            if not low <= value <= high:
                raise ValueError(f"{what}: the recipe's own {value:g} is outside its bounds, {low:g} to {high:g}")
        return self

    @property
    def roles(self) -> Iterator[tuple[str, RoleConfig]]:
        """Every role with its name, base first."""
        yield "base", self.base
        yield "reference", self.reference
        for tuned in self.tuned:
            yield tuned.name or "tuned", tuned.role
        for tuned in self.tuned:
            if tuned.reference is not None:
                yield f"{tuned.knob}/reference", tuned.reference

    @property
    def role_names(self) -> dict[str, int]:
        """What requests call the roles → their place in `roles`. A fine-tuning is called as its weight is."""
        names = {"base": 0, "reference": 1}
        for place, each in enumerate(self.tuned, len(names)):
            names.setdefault(each.knob, place)
        if len(self.tuned) == 1:
            names.setdefault("tuned", 2)
        own = [each.knob for each in self.tuned if each.reference is not None]
        return names | {f"{knob}/reference": place for place, knob in enumerate(own, 2 + len(self.tuned))}

    @property
    def promptable(self) -> frozenset[int]:
        """Places in `roles` of those that a request may give a prompt of their own."""
        names = self.role_names
        return frozenset(names.values() if self.bounds.prompts is None else map(names.__getitem__, self.bounds.prompts))

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that the recipe may run, without duplicates, base first."""
        return tuple(dict.fromkeys(role.model for _, role in self.roles))
