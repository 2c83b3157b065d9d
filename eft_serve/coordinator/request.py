"""A request while it is decoded: its tokens, and how many of them each model's cache has.

The coordinator owns the tokens; a `SequenceState` only records which replica has a cache of them and of how many, so
losing that cache (eviction, preemption, a dead replica) costs work and never a token. After the output there may be
draft tokens, which the models compute like other tokens and which can be dropped at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq

from torch import Tensor

from eft_serve.checkpoints.vocabulary import check_range
from eft_serve.coordinator.speculation import Speculation
from eft_serve.coordinator.timeline import Timeline
from eft_serve.coordinator.validation import check_request
from eft_serve.errors import ContextLengthError
from eft_serve.grammars.matcher import GrammarMatcher
from eft_serve.numerics.rows import LogitsProcessor, RequestRows, Truncation
from eft_serve.types import Combination, GenerationRequest, ModelUsage, SequenceStep, StepOutput, Term, Usage


@dataclass(slots=True, eq=False)
class SequenceState:
    """One model's sequence of a request, for one term of the combination."""

    sequence_id: str
    term: Term
    prompt_token_ids: list[int]
    replica_id: str | None = None  # None: not placed
    num_computed_tokens: int = 0  # tokens in the replica's cache, as far as is known
    num_scored: int = 0  # tokens that follow these in its prompt
    rows: Tensor | None = None  # [positions, vocab_size], logits after the output and each draft token
    usage: ModelUsage | None = None  # so far, without the output; None: not started

    @property
    def model(self) -> str:
        return self.term.model

    @property
    def num_rows(self) -> int:
        return 0 if self.rows is None else self.rows.shape[0]

    def count(self, step: SequenceStep, output: StepOutput) -> None:
        """Count an answer's computed tokens: cached tokens were not computed, all draft tokens but the last were."""
        num_drafted = max(0, len(output.drafted) - 1)
        end = step.position + len(step.token_ids) if output.num_computed_tokens is None else output.num_computed_tokens
        if not end:
            return  # there was no room: it has not started, and may find its prefix cached later
        num_computed = max(0, end - step.position - output.num_cached_tokens) + num_drafted
        if self.usage is None:
            cached = min(output.num_cached_tokens, len(self.prompt_token_ids))
            self.usage = ModelUsage(len(self.prompt_token_ids) + self.num_scored, cached)
        self.usage += ModelUsage(computed_tokens=num_computed)

    def forget(self) -> None:
        """The cache is gone."""
        self.replica_id, self.num_computed_tokens, self.rows = None, 0, None


@dataclass(slots=True, eq=False)
class Request:
    """A user's request, from admission to its last token.

    A prompt whose log-probabilities are wanted is computed up to its first token; its other tokens are scored like
    given ones, and come before the output in `output_token_ids`.
    """

    generation: GenerationRequest
    timeline: Timeline
    last_progress: float  # monotonic seconds; since then it waits for a model, not just for its turn
    speculation: Speculation
    max_tokens: int  # as requested, or what the shortest context leaves; scored prompt tokens included
    forced_token_ids: list[int]  # what `output_token_ids` begins with
    num_ids: int  # size of the vocabulary that its models share; higher ids are padding
    output_token_ids: list[int] = field(default_factory=list)
    draft_token_ids: list[int] = field(default_factory=list)  # what may follow the output
    sequences: tuple[SequenceState, ...] = ()  # one for each term, in their order
    processors: tuple[LogitsProcessor, ...] = ()  # of its logits
    matcher: GrammarMatcher | None = None  # of its grammar, at the output's beginning; it follows the output

    @property
    def combination(self) -> Combination:
        """The combination that it runs."""
        return self.generation.combination

    @property
    def arrival(self) -> float:
        """Monotonic seconds."""
        return self.timeline.arrival

    @property
    def deadline(self) -> float:
        """Monotonic seconds."""
        return self.arrival + self.generation.timeout_s

    @property
    def models(self) -> set[str]:
        """The models that it needs."""
        return {sequence.model for sequence in self.sequences}

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def is_forced(self) -> bool:
        """Whether its output is given and only scored."""
        return self.generation.forced_token_ids is not None

    @property
    def num_scored(self) -> int:
        """Tokens at the beginning of `output_token_ids` that are of its prompt."""
        return 0 if self.is_forced else len(self.forced_token_ids)

    @property
    def has_begun(self) -> bool:
        """Whether it has output, scored prompt tokens aside."""
        return len(self.output_token_ids) > self.num_scored

    @property
    def is_forcing(self) -> bool:
        """Whether its next tokens are given, and only scored."""
        return len(self.output_token_ids) < len(self.forced_token_ids)

    @property
    def cache_salt(self) -> str:
        """Requests with equal salt may share cached prefixes, and could see by timing whether they did."""
        return self.generation.tenant

    @property
    def is_prefilling(self) -> bool:
        """Whether a model has more to compute than the newest token."""
        num_output = len(self.output_token_ids)
        for sequence in self.sequences:  # written out: called many times per step
            if len(sequence.prompt_token_ids) + num_output - sequence.num_computed_tokens > 1:
                return True
        return False

    @property
    def num_left(self) -> int:
        """Tokens that it may still generate."""
        return self.max_tokens - len(self.output_token_ids)

    @classmethod
    def create(cls, generation: GenerationRequest, now: float) -> Request:
        """A new request, without the matcher that it needs if it has a grammar; raises as `check_request`."""
        check_request(generation)
        scores_prompt = generation.prompt_logprobs is not None
        forced = generation.forced_token_ids or []
        if scores_prompt:
            forced = next(iter(generation.prompts.values()))[1:]
        num_scored = len(forced) if scores_prompt else 0
        resumed = generation.resumption
        done = [] if resumed is None else [*forced[: resumed.num_prompt_logprobs], *resumed.token_ids]
        sequences = tuple(
            SequenceState(
                f"{generation.request_id}/{term.name}",
                term,
                generation.prompts[term.name][: 1 if scores_prompt else None],
                num_scored=num_scored,
            )
            for term in generation.combination.terms
        )
        return cls(
            generation,
            timeline=Timeline(now),
            last_progress=now,
            speculation=Speculation.of(generation),
            max_tokens=len(forced) + (generation.sampling.max_tokens if generation.forced_token_ids is None else 0),
            forced_token_ids=forced,
            num_ids=0,
            output_token_ids=done,
            sequences=sequences,
        )

    def set_vocabularies(self, num_tokens: Sequence[int]) -> None:
        """Set `num_ids`, and refuse tokens that its models do not have.

        Args:
            num_tokens: of each sequence's model.

        Raises:
            InvalidRequestError: a token of a prompt or of the forced output is out of range.
        """
        self.num_ids = min(num_tokens)
        for sequence, count in zip(self.sequences, num_tokens, strict=True):
            check_range("prompt", sequence.prompt_token_ids, count)
        check_range("completion" if self.is_forced else "prompt", self.forced_token_ids, self.num_ids)

    def limit(self, room: int) -> None:
        """Limit `max_tokens` to the room for output; raises `ContextLengthError` when more tokens are forced."""
        num_forced = len(self.forced_token_ids)
        if room < num_forced and self.is_forced:
            raise ContextLengthError(
                f"completion: has {num_forced} tokens, and after the prompt there is room for {room}; "
                "shorten one of them",
                param="completion",
            )
        if room < num_forced:
            message = f"prompt: has {num_forced + 1} tokens, and there is room for {room + 1}; shorten it"
            raise ContextLengthError(message, param="prompt")
        self.max_tokens = min(self.max_tokens, room)

    def next_forced(self, count: int) -> list[int]:
        """The next `count` forced tokens, or as many as are left."""
        start = len(self.output_token_ids)
        return self.forced_token_ids[start : start + count]

    @property
    def num_rows(self) -> int:
        """Rows that all its models have given, and that can be combined."""
        return min(sequence.num_rows for sequence in self.sequences)

    def rows(self) -> RequestRows:
        """The rows that all its models have given, for the sampling pipeline."""
        num_rows = self.num_rows
        return RequestRows(
            logits=[sequence.rows for sequence in self.sequences if sequence.rows is not None],
            coefficients=[term.coefficient for term in self.combination.terms],
            num_rows=num_rows,
            vocab_size=self.num_ids,
            sampling=self.generation.sampling,
            # Not copied at every step where nothing of it is prompt: it may be thousands of tokens.
            output_token_ids=self.output_token_ids[self.num_scored :] if self.num_scored else self.output_token_ids,
            draft_token_ids=self.draft_token_ids[:num_rows],
            forced_token_ids=self.next_forced(num_rows) if self.is_forcing else None,
            truncation=self._truncation(),
            processors=() if self.is_forcing else self.processors,
        )

    def _truncation(self) -> Truncation | None:
        top_p, terms = self.combination.truncate_top_p, self.combination.terms
        if top_p == 1 or not any(term.ratio for term in terms):
            return None
        return Truncation(
            top_p=top_p,
            unscaled=[term.unscaled for term in terms],
            ratio=[term.ratio for term in terms],
        )

    def num_tokens(self, sequence: SequenceState) -> int:
        """Tokens that this model has to compute before the next one can be sampled."""
        return len(sequence.prompt_token_ids) + len(self.output_token_ids)

    def num_reserved(self, sequence: SequenceState) -> int:
        """Tokens that its cache may have after the next step."""
        return self.num_tokens(sequence) + len(self.draft_token_ids) + self.speculation.num_requested

    def tokens_between(self, sequence: SequenceState, start: int, end: int) -> list[int]:
        """Tokens `start:end` of prompt, output and draft tokens, concatenated."""
        num_prompt_tokens = len(sequence.prompt_token_ids)
        follows = [*self.output_token_ids, *self.draft_token_ids] if self.draft_token_ids else self.output_token_ids
        if start >= num_prompt_tokens:
            return follows[start - num_prompt_tokens : end - num_prompt_tokens]
        head = sequence.prompt_token_ids[start:end]
        return head + follows[: max(0, end - num_prompt_tokens)]

    def usage(self, completion_tokens: int, now: float) -> Usage:
        """Usage so far, with this many output tokens."""
        models: dict[str, ModelUsage] = {}
        for sequence in self.sequences:
            name = sequence.term.adapter or sequence.model
            used = (sequence.usage or ModelUsage()) + ModelUsage(completion_tokens=completion_tokens)
            models[name] = models.get(name, ModelUsage()) + used
        return Usage(models=models, seconds=now - self.arrival, spec_decode=self.speculation.stats)

    def count_accepted(self, token_ids: Sequence[int]) -> None:
        """Count the draft tokens that equal these tokens, which become output; call it before `take`."""
        if not self.is_forcing:
            self.speculation.count(sum(map(eq, self.draft_token_ids[: self.num_rows], token_ids)))

    def take(self, token_ids: list[int]) -> None:
        """Append output tokens; draft tokens and rows after them are kept if the output equals what was drafted."""
        count = len(token_ids)
        self.output_token_ids += token_ids
        if self.draft_token_ids[:count] != token_ids:
            self.drop_draft_tokens()
            return
        del self.draft_token_ids[:count], self.speculation.confidences[:count]
        for sequence in self.sequences:
            left = None if sequence.rows is None else sequence.rows[count:]
            sequence.rows = left.clone() if left is not None and len(left) else None  # the buffer is not ours

    def drop_draft_tokens(self, kept: int = 0) -> None:
        """Keep the output and `kept` draft tokens; what was computed of the others is overwritten."""
        del self.draft_token_ids[kept:], self.speculation.confidences[kept:]
        for sequence in self.sequences:
            sequence.rows = None
            sequence.num_computed_tokens = min(sequence.num_computed_tokens, self.num_tokens(sequence) - 1)
