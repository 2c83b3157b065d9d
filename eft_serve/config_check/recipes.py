"""Checks the models of a recipe against one another: their tokens must be the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from eft_serve.checkpoints.end_tokens import read_end_tokens
from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.tokenizer import token_ids
from eft_serve.checkpoints.vocabulary import head_rows, known_tokens, vocabulary_difference
from eft_serve.config import AppConfig
from eft_serve.config_check.problem import Problem


def recipe_problems(config: AppConfig) -> Iterator[Problem]:
    """Compares each recipe's models with its base; a model's broken files are reported elsewhere."""
    checkpoints = {name: config.checkpoint_of(name) for name in config.models}
    vocabularies = {name: _token_ids(path) for name, path in checkpoints.items()}
    ends = {name: _end_tokens(path) for name, path in checkpoints.items()}
    for name, recipe in config.recipes.items():
        base, *others = recipe.models
        ours = vocabularies[base]
        for other in others:
            theirs = vocabularies[other]
            if ours and theirs and (message := vocabulary_difference(base, ours, other, theirs)):
                yield Problem(f"recipes.{name}", message)
            if ends[base] and ends[other] and ends[base].isdisjoint(ends[other]):
                message = f"{base} ends a text with {sorted(ends[base])}, {other} with {sorted(ends[other])}"
                yield Problem(
                    f"recipes.{name}",
                    f"{message}; a text will end at any of them; check their generation configs",
                    "warning",
                )


def _token_ids(checkpoint: Path) -> Mapping[str, int]:
    try:
        return known_tokens(token_ids(checkpoint), head_rows(checkpoint))
    except BrokenFileError:
        return {}


def _end_tokens(checkpoint: Path) -> frozenset[int]:
    try:
        return read_end_tokens(checkpoint) or frozenset()
    except BrokenFileError:
        return frozenset()
