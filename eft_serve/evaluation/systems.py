"""Which combinations of a family's models are asked. Knows names and knobs; nothing is computed here."""

from __future__ import annotations

from dataclasses import dataclass

from eft_serve.zoo import FAMILIES
from eft_serve.zoo.generate import Recipe, Term, alone, emulated


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
    def grid(self) -> dict[tuple[str, str], Recipe]:
        """By the scale of pre-training and the scale of fine-tuning."""
        return {
            ("small", "small"): alone(self.tuned_small),
            ("large", "small"): self.up_scaled(),
            ("small", "large"): emulated("down-scaled", self.small, {self.tuned_large: 1.0}, self.large),
            ("large", "large"): alone(self.tuned_large),
        }

    def up_scaled(self, scale: float = 1.0, weight: float = 1.0) -> Recipe:
        """EFT; its knobs at 1 are the paper's up-scaling."""
        return emulated("EFT", self.large, {self.tuned_small: weight}, self.small, scale)

    def without_reference(self, weight: float = 1.0) -> Recipe:
        """The control: the product of the large base and the small tuned model, nothing divided out."""
        return Recipe("control", (Term(self.large, 1.0), Term(self.tuned_small, weight)))

    def interpolated(self, helpful: float, base: str) -> Recipe:
        """The weight `helpful` on the helpful fine-tuning and the rest of 1 on the harmless one."""
        weights = {self.tuned_small: round(helpful, 4), self.harmless: round(1.0 - helpful, 4)}
        return emulated("interpolated", base, weights, self.small)
