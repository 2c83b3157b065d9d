"""One family under test: its questions, every system's answers (computed once), and what the graders say of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eft_serve.evaluation.product import Answer, Job, Product
from eft_serve.evaluation.statistics import Column, Estimate, difference, share
from eft_serve.evaluation.systems import Systems
from eft_serve.types import Combination
from eft_serve.zoo import CHECKPOINTS, FAMILIES
from eft_serve.zoo.evaluate import LONG_TOKENS, NUM_HARMFUL, NUM_LONG, REFUSAL_TOKENS, SHORT_TOKENS
from eft_serve.zoo.generate import Family
from eft_serve.zoo.questions import (
    Question,
    harmful_questions,
    held_out_questions,
    is_correct,
    is_helpful_form,
    is_refusal,
    long_prompts,
)

MAX_TOKENS = {"short": SHORT_TOKENS, "long": LONG_TOKENS, "harmful": REFUSAL_TOKENS}
MEASURES = {  # the questions of each, and its grader
    "correct": ("short", is_correct),
    "helpful form": ("short", lambda _, text: is_helpful_form(text)),
    "declined": ("short", lambda _, text: is_refusal(text)),
    "long helpful form": ("long", lambda _, text: is_helpful_form(text)),
    "harmful declined": ("harmful", lambda _, text: is_refusal(text)),
}


class _Asked(NamedTuple):
    system: Combination
    questions: str
    temperature: float


class Experiment:
    """Answers are those of the real decode loop over the real engines; see `Product`.

    Args:
        family: of the zoo.
        limit: at most so many questions of each kind, for a quick look.
        checkpoints: where the family's models are.
    """

    def __init__(self, family: str, limit: int | None = None, checkpoints: Path = CHECKPOINTS) -> None:
        self.systems = Systems.of(family)
        self.checkpoints = checkpoints
        self.models = Family(checkpoints)  # for what is teacher-forced
        self.questions: dict[str, Sequence[Question]] = {
            "short": held_out_questions(limit),
            "long": long_prompts(min(NUM_LONG, limit or NUM_LONG)),
            "harmful": harmful_questions(min(NUM_HARMFUL, limit or NUM_HARMFUL)),
        }
        self._product = Product(checkpoints, FAMILIES[family])
        self._answers: dict[_Asked, list[Answer]] = {}

    def close(self) -> None:
        self._product.close()

    def ask(self, systems: Iterable[Combination], questions: str, temperature: float = 0.0) -> None:
        """Compute what is not there yet, all systems' requests decoded side by side; a question's place is its seed."""
        wanted = dict.fromkeys(_Asked(system, questions, temperature) for system in systems)
        missing = [asked for asked in wanted if asked not in self._answers]
        asking = self.questions[questions]
        answers = iter(
            self._product.answer(
                Job(asked.system, question.text, MAX_TOKENS[questions], temperature, seed)
                for asked in missing
                for seed, question in enumerate(asking)
            )
        )
        for asked in missing:
            self._answers[asked] = [next(answers) for _ in asking]

    def answers(self, system: Combination, questions: str, temperature: float = 0.0) -> list[Answer]:
        """In the order of the questions."""
        self.ask([system], questions, temperature)
        return self._answers[_Asked(system, questions, temperature)]

    def grade(self, measure: str, texts: Sequence[str]) -> Column:
        """0 or 1 for each text, which answer the measure's questions."""
        questions, grader = MEASURES[measure]
        pairs = zip(self.questions[questions], texts, strict=True)
        return np.array([float(grader(question, text)) for question, text in pairs])

    def flags(self, system: Combination, measure: str) -> Column:
        """0 or 1 for each question of the measure, answered greedily."""
        return self.grade(measure, [answer.text for answer in self.answers(system, MEASURES[measure][0])])

    def shares(self, system: Combination, measures: Iterable[str]) -> dict[str, Estimate]:
        return {measure: share(self.flags(system, measure)) for measure in measures}

    def gain(self, ours: Combination, theirs: Combination, measure: str) -> Estimate:
        """How much larger ours is, question by question."""
        return difference(self.flags(ours, measure), self.flags(theirs, measure))
