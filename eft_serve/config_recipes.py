"""Recipes: which models are combined, how each is prompted, and which knobs a request may turn how far."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from eft_serve.config_base import Frozen, Name

ROLES = ("base", "reference", "tuned")
DRAFTERS = ("auto", "none")  # beside the recipe's own models
MAX_DRAFT_TOKENS = 16
MAX_KNOB = 100.0  # far beyond any use; keeps |logit| * knob finite in fp32

Interval = tuple[float, float]


def _check_interval(interval: Interval) -> Interval:
    if interval[0] > interval[1]:
        raise ValueError(f"{list(interval)}: give the lower bound first")
    return interval


Knob = Annotated[float, Field(ge=-MAX_KNOB, le=MAX_KNOB, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
KnobInterval = Annotated[tuple[Knob, Knob], AfterValidator(_check_interval)]
ProbabilityInterval = Annotated[tuple[Probability, Probability], AfterValidator(_check_interval)]


class PromptConfig(Frozen):
    """How a model is prompted; what is not set is as the model itself has it."""

    chat_template: Path | None = None
    """File of a Jinja chat template; the model's own when not set, and a plain format when it has none."""
    system_prompt: str | None = None
    """What this model is told before everything else; the others are not."""
    response_prefix: str | None = None
    """How its answer has begun already, in this model's eyes only."""


AS_ITSELF = PromptConfig()


class RoleConfig(PromptConfig):
    """A model in one role of a recipe. A bare name is the model prompted in its own way."""

    model: Name

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data

    @property
    def role(self) -> RoleConfig:
        """Model and prompt alone: equal roles are one distribution."""
        return RoleConfig(model=self.model, **dict(self.prompting))

    @property
    def prompting(self) -> PromptConfig:
        """Its prompt settings alone."""
        return PromptConfig(**{name: getattr(self, name) for name in PromptConfig.model_fields})


class TunedConfig(RoleConfig):
    """One fine-tuning: the model that has it, and the one that it was tuned from."""

    name: Name | None = None
    """What requests and bounds call its weight; the model's name when not set."""
    reference: RoleConfig | None = None
    """Default: the recipe's reference."""
    weight: Knob = 1.0
    """alpha: how much of this fine-tuning."""

    @model_validator(mode="after")
    def _is_not_called_a_role(self) -> Self:
        if self.name in ROLES:
            raise ValueError(f"name: {self.name!r} is what a role is called; choose another")
        return self

    @property
    def knob(self) -> str:
        """The name of its weight."""
        return self.name or self.model


class BoundsConfig(Frozen):
    """[lowest, highest] that a request may ask for; two equal numbers fix a knob."""

    scale: KnobInterval = (-MAX_KNOB, MAX_KNOB)
    weights: dict[Name, KnobInterval] = Field(default_factory=dict)
    """By fine-tuning; those not named are not bounded."""
    truncate_top_p: ProbabilityInterval = (0.0, 1.0)

    def weight(self, knob: str) -> Interval:
        """Those of one fine-tuning."""
        return self.weights.get(knob, (-MAX_KNOB, MAX_KNOB))


class SpeculativeConfig(Frozen):
    """How a recipe's tokens are drafted (arXiv 2310.12962). No setting changes their distribution."""

    draft: Name = "auto"
    """Who draft tokens: `auto`, the tuned model of the largest weight; `none`, nobody; or a model of the recipe."""
    num_tokens: int = Field(default=8, ge=1, le=MAX_DRAFT_TOKENS)
    """Draft tokens at a time, at most."""
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    """The drafter goes on while it gives its draft tokens this probability, all together; 0 never stops it."""
    overlap: bool = True
    """Draft on while draft tokens are verified."""
    disable_by_batch_size: int = Field(default=32, ge=0)
    """Nothing is drafted while more requests than this decode: a large batch has no idle device to draft on."""


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
    """The scale-up counts only for tokens in the top-p nucleus of what there is at scale 0; 1 counts it for all."""
    bounds: BoundsConfig = BoundsConfig()
    """How far a request may turn the knobs."""
    speculative: SpeculativeConfig = SpeculativeConfig()
    """How tokens are drafted."""

    @model_validator(mode="after")
    def _drafter_is_known(self) -> Self:
        if self.speculative.draft not in {*DRAFTERS, *self.models}:
            raise ValueError(
                f"speculative.draft: {self.speculative.draft!r} is not of this recipe; give one of "
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
    def models(self) -> tuple[str, ...]:
        """Every model that the recipe may run, each once, base first."""
        return tuple(dict.fromkeys(role.model for _, role in self.roles))
