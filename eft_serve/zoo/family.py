"""The sizes and schedules of the models of both families. Knows what is trained from what; not how."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eft_serve.zoo import PREFIXES

ROW_LENGTH = 160  # tokens; the longest document of the corpus fits


@dataclass(frozen=True)
class Architecture:
    """A Llama shape, or Falcon's "new decoder" one; every count divides by two, for tensor parallelism."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    falcon_groups: int | None = None  # key/value heads of a Falcon; None makes a Llama


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on how much a model is trained."""

    steps: int
    learning_rate: float
    rows: int
    warmup: int

    def scaled(self, factor: float) -> Schedule:
        return replace(self, steps=max(1, round(self.steps * factor)), warmup=max(1, round(self.warmup * factor)))


@dataclass(frozen=True)
class TrainingRecipe:
    """One model: a base has an architecture, a fine-tune has a parent."""

    name: str
    schedule: Schedule
    architecture: Architecture | None = None
    parent: str | None = None
    harmless: bool = False


LARGE = Architecture(hidden=192, layers=4, heads=6, intermediate=512)
SMALL = Architecture(hidden=48, layers=2, heads=4, intermediate=144)

# Two groups of key/value heads leave fewer attention weights: the wider middle makes up for them.
FALCON_LARGE = Architecture(hidden=192, layers=4, heads=6, intermediate=896, falcon_groups=2)
FALCON_SMALL = Architecture(hidden=48, layers=2, heads=4, intermediate=240, falcon_groups=2)


def _family(prefix: str, large: Architecture, small: Architecture, large_steps: int) -> tuple[TrainingRecipe, ...]:
    return (
        TrainingRecipe(f"{prefix}base-large", Schedule(large_steps, 1.5e-3, 12, 150), architecture=large),
        TrainingRecipe(f"{prefix}base-small", Schedule(3000, 3e-3, 12, 150), architecture=small),
        TrainingRecipe(f"{prefix}tuned-small", Schedule(150, 1e-3, 8, 10), parent=f"{prefix}base-small"),
        TrainingRecipe(f"{prefix}tuned-large", Schedule(100, 3e-4, 8, 10), parent=f"{prefix}base-large"),
        TrainingRecipe(
            f"{prefix}tuned-small-harmless",
            Schedule(150, 1e-3, 8, 10),
            parent=f"{prefix}base-small",
            harmless=True,
        ),
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        *_family(PREFIXES["llama"], LARGE, SMALL, large_steps=3000),
        *_family(PREFIXES["falcon"], FALCON_LARGE, FALCON_SMALL, large_steps=2000),
    )
}


def recipe_named(name: str, steps_scale: float = 1.0) -> TrainingRecipe:
    """A recipe, possibly shortened for a trial."""
    recipe = RECIPES[name]
    return replace(recipe, schedule=recipe.schedule.scaled(steps_scale))
