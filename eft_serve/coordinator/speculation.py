"""A request's speculative decoding: who drafts its next tokens, and how many were accepted so far.

Drafting is part of the ordinary step: the model that drafts goes on by itself from its own logits while the others
compute the draft tokens of the step before. So a step without draft tokens is plain decoding, and none costs another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from eft_serve.types import Draft, GenerationRequest, SpecDecodeStats, Speculative, Term


@dataclass(slots=True)
class Speculation:
    """One request's."""

    drafter: str | None  # name of the term whose model drafts; None: nobody
    settings: Speculative
    num_requested: int = 0  # draft tokens that the drafter is asked for in the present step
    confidences: list[float] = field(default_factory=list)  # of the request's draft tokens, as its drafter sees them
    stats: SpecDecodeStats = field(default_factory=SpecDecodeStats)

    @classmethod
    def of(cls, generation: GenerationRequest) -> Speculation:
        """Nobody drafts tokens that are forced."""
        asked = generation.speculative if generation.forced_token_ids is None else None
        settings = asked or Speculative(draft="none")
        return cls(_drafter(settings.draft, generation.combination.terms), settings)

    def count_drafted(self, count: int) -> None:
        self.stats += SpecDecodeStats(num_drafted=count)

    def count(self, num_accepted: int) -> None:
        """A step has given the request tokens, so many of them drafted."""
        self.stats += SpecDecodeStats(num_accepted=num_accepted, num_passes=1)

    def request(self, num_drafted: int, num_left: int, batch_size: int) -> None:
        """Say how many tokens the drafter is asked for in this step.

        Args:
            num_drafted: draft tokens that are still to be verified.
            num_left: tokens that may still be generated.
            batch_size: requests that decode in this step.
        """
        is_on = self.drafter is not None and batch_size <= self.settings.disable_by_batch_size
        may_draft = is_on and (self.settings.overlap or num_drafted == 0)
        self.num_requested = max(0, min(self.settings.num_tokens, num_left - num_drafted)) if may_draft else 0

    def draft(self, generation: GenerationRequest, count: int, position: int, num_ids: int) -> Draft:
        """What its drafter is sent.

        Args:
            count: draft tokens wanted.
            position: of the first draft token within the output.
            num_ids: the vocabulary that all its models share.
        """
        return Draft(
            num_tokens=count,
            position=position,
            num_ids=num_ids,
            sampling=generation.sampling,
            confidence=prod(self.confidences),
            min_confidence=self.settings.min_confidence,
        )


def _drafter(draft: str, terms: Sequence[Term]) -> str | None:
    """`auto` is the tuned model of the largest weight, as of several prompts of one model it is that of the largest;
    nobody drafts for a model that runs alone."""
    drafting = [t for t in terms if (t.weight > 0 if draft == "auto" else draft in (t.name, t.adapter or t.model))]
    return max(drafting, key=lambda term: term.weight).name if len(terms) > 1 and drafting else None
