"""A request's speculation: who guesses its next tokens, which guesses stand, and how many did so far.

Guessing is part of the ordinary step: the model that drafts goes on by itself from its own logits while the others
compute the guesses of the step before. So a step without guesses is plain decoding, and no step costs another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from eft_serve.ensemble import Term
from eft_serve.numerics.speculative import guess_seeds
from eft_serve.types import Draft, GenerationRequest, GuessReport, Speculative

KEPT = 0.9  # of what is known of a request's acceptance, with each further step
PRIOR_TRIALS = 3.0  # a new request is believed to be like those before it, as if so many guesses had said so
NGRAM = "ngram"


@dataclass(slots=True)
class Speculation:
    """One request's."""

    drafter: str | None  # name of the term whose model drafts; NGRAM: the text itself; None: nobody
    settings: Speculative
    num_asked: int = 0  # guesses that the drafter is asked for in the present step
    confidences: list[float] = field(default_factory=list)  # of the request's guesses, as its drafter sees them
    is_short: bool = False  # the drafter gave fewer than it was asked for
    report: GuessReport = field(default_factory=GuessReport)
    _successes: float = 0.0  # of guesses that were put to the test, fading
    _trials: float = 0.0

    @classmethod
    def of(cls, generation: GenerationRequest, terms: Sequence[Term]) -> Speculation:
        """Nobody guesses what is given."""
        asked = generation.speculative if generation.given is None else None
        settings = asked or Speculative(draft="none")
        return cls(_drafter(settings.draft, terms), settings)

    def count_drafted(self, count: int) -> None:
        self.report += GuessReport(num_drafted=count)

    def acceptance(self, prior: float) -> float:
        """The chance that the next guess stands; `prior` is that of requests like this one."""
        return (self._successes + PRIOR_TRIALS * prior) / (self._trials + PRIOR_TRIALS)

    def count(self, num_accepted: int, num_tested: int) -> None:
        """A step has put so many guesses to the test; those behind the first that fell were not."""
        self.report += GuessReport(num_accepted=num_accepted, num_passes=1)
        self._successes = KEPT * self._successes + num_accepted
        self._trials = KEPT * self._trials + num_tested

    def draft(self, generation: GenerationRequest, count: int, position: int, num_ids: int) -> Draft:
        """What its drafter is sent.

        Args:
            count: guesses wanted.
            position: of the first guess within the output.
            num_ids: the vocabulary that all its models share.
        """
        sampling = generation.sampling
        return Draft(
            num_tokens=count,
            position=position,
            num_ids=num_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            confidence=prod(self.confidences),
            min_confidence=self.settings.min_confidence,
            seed=sampling.seed if self.settings.method == "keyed" else int(guess_seeds(torch.tensor([sampling.seed]))),
        )


def _drafter(draft: str, terms: Sequence[Term]) -> str | None:
    """`auto` is the tuned model of the largest weight, as of several prompts of one model it is that of the largest;
    nobody drafts for a model that runs alone."""
    if draft == NGRAM:
        return NGRAM
    drafting = [t for t in terms if (t.weight > 0 if draft == "auto" else draft in (t.name, t.adapter or t.model))]
    return max(drafting, key=lambda term: term.weight).name if len(terms) > 1 and drafting else None


def look_up(tokens: Sequence[int], num_tokens: int, longest: int = 3) -> list[int]:
    """What followed the last occurrence of the newest tokens (prompt look-up); empty when they are new.

    Args:
        tokens: prompt and output.
        num_tokens: at most so many.
        longest: how many of the newest tokens have to agree at best; fewer are tried after.
    """
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        newest = list(tokens[-size:])
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == newest:
                return list(tokens[start + size : start + size + num_tokens])
    return []
