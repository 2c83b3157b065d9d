"""What is wrong between the models of a recipe: tokens that do not mean the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eft_serve.config import AppConfig
from eft_serve.config_check.checkpoint import BrokenFileError, read_json, token_ids
from eft_serve.config_check.problem import Problem


def recipe_problems(config: AppConfig) -> Iterator[Problem]:
    """Each recipe's models compared with its base; a model whose files are broken is reported elsewhere."""
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


def vocabulary_difference(base: str, ours: Mapping[str, int], other: str, theirs: Mapping[str, int]) -> str | None:
    """How two models' tokens differ, naming both and the first difference; None when they are the same."""
    if ours == theirs:
        return None
    token_id = min(token_id for _, token_id in ours.items() ^ theirs.items())
    said = {
        model: sorted(token for token, i in ids.items() if i == token_id)
        for model, ids in ((base, ours), (other, theirs))
    }
    spelt = (f"{model} has {', '.join(map(repr, tokens)) or 'none'}" for model, tokens in said.items())
    return (
        f"{base} and {other} have different vocabularies, first at id {token_id}: {', '.join(spelt)}; "
        "the models of a recipe must share one tokenizer"
    )


def _token_ids(checkpoint: Path) -> dict[str, int]:
    try:
        return token_ids(checkpoint / "tokenizer.json")
    except BrokenFileError:
        return {}


def _end_tokens(checkpoint: Path) -> set[int]:
    for name in ("generation_config.json", "config.json"):
        try:
            found: Any = read_json(checkpoint / name).get("eos_token_id")
        except BrokenFileError:
            continue
        if found is not None:
            return {i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)}
    return set()
