"""The combinations of a family's models under test. Knows names and knobs; the formula is the product's own."""

from __future__ import annotations

from dataclasses import dataclass

from eft_serve.config_recipes import RecipeConfig, RoleConfig, TunedConfig
from eft_serve.ensemble import resolve_recipe
from eft_serve.types import Combination, Term
from eft_serve.zoo import FAMILIES


def alone(model: str) -> Combination:
    """One model as it is."""
    return Combination((Term(model, model, 1.0),))


def emulated(
    base: str, tuned: dict[str, float], reference: str, scale: float = 1.0, truncate_top_p: float = 1.0
) -> Combination:
    """As a recipe with these roles, the weight of each fine-tuning, and these knobs."""
    recipe = RecipeConfig(
        base=RoleConfig(model=base),
        reference=RoleConfig(model=reference),
        tuned=tuple(TunedConfig(model=model, weight=weight) for model, weight in tuned.items()),
        scale=scale,
        truncate_top_p=truncate_top_p,
    )
    return resolve_recipe(recipe)


@dataclass(frozen=True)
class Systems:
    """One family's models by role, and the systems made of them."""

    large: str
    small: str
    tuned_small: str
    tuned_large: str
    harmless: str

    @classmethod
    def of(cls, family: str) -> Systems:
        return cls(*FAMILIES[family])

    @property
    def grid(self) -> dict[tuple[str, str], Combination]:
        """By the scale of pre-training and the scale of fine-tuning."""
        return {
            ("small", "small"): alone(self.tuned_small),
            ("large", "small"): self.up_scaled(),
            ("small", "large"): emulated(self.small, {self.tuned_large: 1.0}, self.large),
            ("large", "large"): alone(self.tuned_large),
        }

    def up_scaled(self, scale: float = 1.0, weight: float = 1.0, truncate_top_p: float = 1.0) -> Combination:
        """EFT; its knobs at 1 are the paper's up-scaling."""
        return emulated(self.large, {self.tuned_small: weight}, self.small, scale, truncate_top_p)

    def without_reference(self, weight: float = 1.0) -> Combination:
        """The control, which is no recipe: large base times small tuned model, nothing divided out."""
        return Combination((Term(self.large, self.large, 1.0), Term(self.tuned_small, self.tuned_small, weight)))

    def interpolated(self, helpful: float, base: str) -> Combination:
        """The weight `helpful` on the helpful fine-tuning and the rest of 1 on the harmless one."""
        return emulated(base, {self.tuned_small: helpful, self.harmless: 1.0 - helpful}, self.small)
