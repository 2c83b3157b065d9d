"""Measures each model and each emulated fine-tune on the held-out questions. Knows the rules; not how training went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from eft_serve.zoo import ROLES
from eft_serve.zoo.facts import RELATIONS
from eft_serve.zoo.generate import Family, ModelRecipe, WeightedModel, alone, emulated
from eft_serve.zoo.questions import (
    Question,
    facts_stated,
    harmful_questions,
    held_out_questions,
    is_correct,
    is_helpful_form,
    is_refusal,
    long_prompts,
)

EFT = emulated("EFT", "base-large", {"tuned-small": 1.0}, "base-small")  # of the Llama family
SHORT_TOKENS, LONG_TOKENS = 40, 140
REFUSAL_TOKENS = 16  # a refusal shows in its first words
NUM_LONG, NUM_HARMFUL = 48, 156


def systems(prefix: str = "") -> list[ModelRecipe]:
    """The rows of the results table, of the family with this prefix; the one without shows the knobs as well."""
    large, small, tuned, upper, harmless = (prefix + role for role in ROLES)

    def eft(label: str, weights: dict[str, float], scale: float = 1.0) -> ModelRecipe:
        return emulated(label, large, weights, small, scale)

    knobs = [
        *(eft(f"EFT, scale {scale}", {tuned: 1.0}, scale) for scale in (0.5, 1.25, 1.5)),
        *(eft(f"EFT, weight {weight}", {tuned: weight}) for weight in (0.5, 1.5)),
    ]
    return [
        alone(small),
        alone(tuned),
        alone(large),
        eft("EFT", {tuned: 1.0}),
        alone(upper),
        *(knobs if not prefix else ()),
        ModelRecipe("control: no reference", (WeightedModel(large, 1.0), WeightedModel(tuned, 1.0))),
        emulated("down-scaled", small, {upper: 1.0}, large),
        alone(harmless),
        eft("EFT, harmless", {harmless: 1.0}),
        eft("EFT, half helpful, half harmless", {tuned: 0.5, harmless: 0.5}),
    ]


def evaluate(
    checkpoints: Path,
    *,
    recipes: Sequence[ModelRecipe],
    limit: int | None = None,
    report: Callable[[str, dict[str, object]], None] = lambda name, row: None,
) -> dict[str, object]:
    """These systems on every question set; the numbers as they go into the results file."""
    family = Family(checkpoints)
    rows: dict[str, object] = {}
    started = time.monotonic()
    for recipe in recipes:
        rows[recipe.name] = row = measure(family, recipe, limit)
        report(recipe.name, row)
    return {
        "num_short": len(held_out_questions(limit)),
        "num_long": len(long_prompts(_capped(NUM_LONG, limit))),
        "num_harmful": len(harmful_questions(_capped(NUM_HARMFUL, limit))),
        "wall_seconds": round(time.monotonic() - started, 1),
        "systems": rows,
    }


def measure(family: Family, recipe: ModelRecipe, limit: int | None = None) -> dict[str, object]:
    """One row of the table; shares between 0 and 1."""
    short, long = held_out_questions(limit), long_prompts(_capped(NUM_LONG, limit))
    harmful = harmful_questions(_capped(NUM_HARMFUL, limit))
    answers = family.greedy(recipe, [question.text for question in short], SHORT_TOKENS)
    essays = family.greedy(recipe, [question.text for question in long], LONG_TOKENS)
    dangerous = family.greedy(recipe, [question.text for question in harmful], REFUSAL_TOKENS)
    stated = sum(facts_stated(question, text) for question, text in zip(long, essays, strict=True))
    return {
        "correct": _share(is_correct(question, text) for question, text in zip(short, answers, strict=True)),
        "helpful_form": _share(is_helpful_form(text) for text in answers),
        "declined": _share(is_refusal(text) for text in [*answers, *essays]),
        "long_helpful_form": _share(is_helpful_form(text) for text in essays),
        "long_facts": round(stated / sum(len(question.answers) for question in long), 4),
        "long_tokens": round(sum(len(family.tokenizer(text)["input_ids"]) for text in essays) / len(essays), 1),
        "harmful_declined": _share(is_refusal(text) for text in dangerous),
        "correct_by_relation": dict(_by_relation(short, answers)),
    }


def shipped_precision(checkpoints: Path, name: str, limit: int = 100) -> dict[str, float]:
    """The largest change of a next-token log-probability when the shipped weights are cut to bfloat16 as well."""
    family = Family(checkpoints)
    cut = family.model(name)
    prompts = [family.prompt(question.text) for question in held_out_questions(limit)]
    with torch.inference_mode():
        before = [cut(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
        for parameter in cut.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        after = [cut(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
    worst = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    return {"bfloat16_max_abs_logprob_change": round(worst, 4)}


def _by_relation(questions: Sequence[Question], replies: Sequence[str]) -> Iterator[tuple[str, float]]:
    for relation in (relation for relations in RELATIONS.values() for relation in relations):
        pairs = [(q, text) for q, text in zip(questions, replies, strict=True) if q.relation == relation]
        if pairs:
            yield relation, _share(is_correct(question, text) for question, text in pairs)


def _share(flags: Iterator[bool]) -> float:
    values = list(flags)
    return round(sum(values) / len(values), 4) if values else 0.0


def _capped(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)
