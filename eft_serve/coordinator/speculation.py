"""A request's speculative decoding: which model drafts its next tokens, and how many were accepted so far.

Drafting is part of the ordinary step: the drafter goes on from its own logits while the other models compute the draft
tokens of the step before. So a step without draft tokens is plain decoding, and drafting adds no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from eft_serve.types import Draft, GenerationRequest, SamplingParams, SpecDecodeStats, Speculative, Term


@dataclass(slots=True)
class Speculation:
    """Speculative decoding of one request."""

    drafter: str | None  # name of the term whose model drafts; None: no drafting
    settings: Speculative
    num_requested: int = 0  # draft tokens that the drafter is asked for in this step
    confidences: list[float] = field(default_factory=list)  # the drafter's probability of each draft token
    stats: SpecDecodeStats = field(default_factory=SpecDecodeStats)
    sampling: SamplingParams = field(default_factory=SamplingParams)  # of the drafter

    @classmethod
    def of(cls, generation: GenerationRequest) -> Speculation:
        """A given output is not drafted."""
        asked = generation.speculative if generation.forced_token_ids is None else None
        settings = asked or Speculative(draft="none")
        drafter = _drafter(settings.draft, generation.combination.terms)
        return cls(drafter, settings, sampling=generation.sampling.for_draft)

    def count_drafted(self, count: int) -> None:
        self.stats += SpecDecodeStats(num_drafted=count)

    def count(self, num_accepted: int) -> None:
        """Count a step that gave the request tokens, with its accepted draft tokens."""
        self.stats += SpecDecodeStats(num_accepted=num_accepted, num_passes=1)

    def request(self, num_drafted: int, num_left: int, batch_size: int) -> None:
        """Set how many tokens the drafter is asked for in this step.

        Args:
            num_drafted: draft tokens that are still to be verified.
            num_left: tokens that may still be generated.
            batch_size: requests that decode in this step.
        """
        is_on = self.drafter is not None and batch_size <= self.settings.disable_by_batch_size
        may_draft = is_on and (self.settings.overlap or num_drafted == 0)
        self.num_requested = max(0, min(self.settings.num_tokens, num_left - num_drafted)) if may_draft else 0

    def draft(self, count: int, position: int, num_ids: int) -> Draft:
        """The drafting instruction for the drafter's step.

        Args:
            count: draft tokens wanted.
            position: of the first draft token within the output.
            num_ids: size of the vocabulary that all its models share.
        """
        return Draft(
            num_tokens=count,
            position=position,
            num_ids=num_ids,
            sampling=self.sampling,
            confidence=prod(self.confidences),
            min_confidence=self.settings.min_confidence,
        )


def _drafter(draft: str, terms: Sequence[Term]) -> str | None:
    """The drafting term; `auto` is the tuned model with the largest weight. None if a model runs alone.

    If one model reads several prompts, the term with the largest weight drafts.
    """
    drafting = [t for t in terms if (t.weight > 0 if draft == "auto" else draft in (t.name, t.adapter or t.model))]
    return max(drafting, key=lambda term: term.weight).name if len(terms) > 1 and drafting else None
