"""A request while it is decoded: its tokens, and how far each model's cache has followed them.

The coordinator owns the tokens; a `SequenceState` only remembers which replica holds a cache of them and how much of
it, so losing that cache (eviction, preemption, a dead replica) costs work and never a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from eft_serve.ensemble import Term
from eft_serve.types import GenerationRequest


@dataclass(slots=True, eq=False)
class SequenceState:
    """One model's view of a request, for one term of the combination."""

    sequence_id: str
    term: Term
    prompt_token_ids: list[int]
    replica_id: str | None = None  # None: not placed
    num_computed: int = 0  # tokens that the replica holds, as far as we know

    @property
    def model(self) -> str:
        return self.term.model

    def forget(self) -> None:
        """The cache is gone."""
        self.replica_id, self.num_computed = None, 0


@dataclass(slots=True, eq=False)
class Request:
    """A user's request, from admission to its last token."""

    generation: GenerationRequest
    terms: tuple[Term, ...]  # no coefficient is zero; they sum to 1 when the recipe's formula does
    arrival: float  # monotonic seconds
    last_progress: float  # monotonic seconds; since then it waits for a model and not only for its turn
    output_token_ids: list[int] = field(default_factory=list)
    sequences: tuple[SequenceState, ...] = ()  # one for each term, in their order
    num_preemptions: int = 0

    @property
    def deadline(self) -> float:
        """Monotonic seconds."""
        return self.arrival + self.generation.timeout_s

    @property
    def models(self) -> set[str]:
        """Those that it needs."""
        return {sequence.model for sequence in self.sequences}

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def cache_salt(self) -> str:
        """Requests of equal salt may reuse one another's caches, and could tell by the time whether they did."""
        return self.generation.tenant

    @classmethod
    def create(cls, generation: GenerationRequest, terms: Sequence[Term], now: float) -> Request:
        """A request that has not begun; needs a prompt for every term."""
        sequences = tuple(
            SequenceState(f"{generation.request_id}/{term.name}", term, generation.prompts[term.name]) for term in terms
        )
        return cls(generation, tuple(terms), arrival=now, last_progress=now, sequences=sequences)

    def num_tokens(self, sequence: SequenceState) -> int:
        """Tokens that this model has to hold before the next one can be drawn."""
        return len(sequence.prompt_token_ids) + len(self.output_token_ids)

    def num_pending(self, sequence: SequenceState) -> int:
        """Tokens still to be computed before the next one can be drawn."""
        return self.num_tokens(sequence) - sequence.num_computed

    def tokens_between(self, sequence: SequenceState, start: int, end: int) -> list[int]:
        """Tokens `start:end` of prompt and output together."""
        num_prompt_tokens = len(sequence.prompt_token_ids)
        if start >= num_prompt_tokens:
            return self.output_token_ids[start - num_prompt_tokens : end - num_prompt_tokens]
        head = sequence.prompt_token_ids[start:end]
        return head + self.output_token_ids[: max(0, end - num_prompt_tokens)]
