"""The vocabularies of all deployments; checks that the models of a recipe share one. Knows no request."""

from __future__ import annotations

from eft_serve.checkpoints.vocabulary import Vocabulary, vocabulary_difference
from eft_serve.config import AppConfig
from eft_serve.errors import ConfigError


def load_vocabularies(config: AppConfig) -> dict[str, Vocabulary]:
    """The vocabulary of every deployment; adapters share it.

    Raises:
        CheckpointError: a tokenizer cannot be loaded.
        ConfigError: two models of one recipe differ in a token; the message names both and the first difference.
    """
    vocabularies = {name: Vocabulary.load(model.checkpoint) for name, model in config.deployments.items()}
    for name, recipe in config.recipes.items():
        base, *others = dict.fromkeys(map(config.deployment_of, recipe.models))
        for other in others:
            ours, theirs = vocabularies[base].ids, vocabularies[other].ids
            if message := vocabulary_difference(base, ours, other, theirs):
                raise ConfigError(f"recipes.{name}: {message}", param=f"recipes.{name}")
    return vocabularies
