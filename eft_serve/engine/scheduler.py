"""From a list of steps to forwards: who fits, who is evicted, and how tokens are split; knows no tensors and no model.

Steps are admitted in the order of the list, and that order is their priority: when blocks run out, sequences outside
the list go first (least recently stepped), then later steps of the list, last first. So the first step always makes
progress, and an evicted sequence is answered with `num_computed_tokens = 0`. Blocks that a sequence shares with one
that stays are not freed by its eviction.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from eft_serve.engine.batch import BatchRow
from eft_serve.engine.block_pool import blocks_for
from eft_serve.engine.kv_cache import KVCache, Sequence
from eft_serve.types import SequenceStep, StepOutput


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may ask for."""

    vocab_size: int
    max_model_len: int
    max_num_batched_tokens: int
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Admitted:
    """A step whose sequence has blocks for all that is computed of it."""

    index: int  # of the step in the caller's list
    step: SequenceStep
    sequence: Sequence
    start: int  # into the step's token_ids; those before it were found in the cache
    stop: int  # those from there on are left for another step

    @property
    def num_logits(self) -> int:
        """Logits of a step that is left half-way are not wanted."""
        return self.step.num_logits if self.stop == len(self.step.token_ids) else 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous part of an admitted step that goes into one forward."""

    admitted: Admitted
    start: int  # into the step's token_ids
    stop: int

    @property
    def token_ids(self) -> list[int]:
        return self.admitted.step.token_ids[self.start : self.stop]

    @property
    def num_logits(self) -> int:
        first_wanted = self.admitted.stop - self.admitted.num_logits
        return max(0, self.stop - max(self.start, first_wanted))

    def row(self) -> BatchRow:
        step, end = self.admitted.step, self.admitted.step.position + self.stop
        return BatchRow(
            token_ids=self.token_ids,
            position=step.position + self.start,
            block_ids=self.admitted.sequence.block_ids[: blocks_for(end)],
            num_logits=self.num_logits,
            adapter=self.admitted.sequence.adapter,
        )


def waves(steps: SequenceOf[SequenceStep]) -> list[list[tuple[int, SequenceStep]]]:
    """Split a list so that no wave names a sequence twice; the order of each sequence's steps is kept."""
    seen: dict[str, int] = {}
    result: list[list[tuple[int, SequenceStep]]] = []
    for index, step in enumerate(steps):
        wave = seen.get(step.sequence_id, 0)
        seen[step.sequence_id] = wave + 1
        if wave == len(result):
            result.append([])
        result[wave].append((index, step))
    return result


def find_mistake(step: SequenceStep, limits: Limits, capacity_tokens: int) -> str | None:
    """Why this step can never be served, naming the field; None when it can."""
    total = step.position + len(step.token_ids)
    if step.position < 0:
        return f"position: {step.position} is negative"
    if not step.token_ids:
        return "token_ids: empty; a step computes at least one token"
    if not 0 <= step.num_logits <= len(step.token_ids):
        return f"num_logits: {step.num_logits} is not between 0 and the {len(step.token_ids)} token_ids"
    if step.max_computed is not None and step.max_computed < 1:
        return f"max_computed: {step.max_computed}; a step computes at least one token"
    if step.draft is not None and not (step.num_logits and 0 < step.draft.num_ids <= limits.vocab_size):
        return f"draft: wants num_logits, and num_ids of 1 to {limits.vocab_size}; num_ids is {step.draft.num_ids}"
    if step.draft is not None and step.draft.num_tokens < 1:
        return f"draft.num_tokens: {step.draft.num_tokens}; at least one is drafted"
    for field in ("salt", "adapter"):
        if getattr(step, field) is not None and step.position > 0:
            return f"{field}: given at position {step.position}; a sequence gets it at position 0 and keeps it"
    if step.adapter is not None and step.adapter not in limits.adapters:
        return f"adapter: {step.adapter!r} is not among this model's {sorted(limits.adapters)}"
    if min(step.token_ids) < 0 or max(step.token_ids) >= limits.vocab_size:
        bad = next(t for t in step.token_ids if not 0 <= t < limits.vocab_size)
        return f"token_ids: {bad} is outside the vocabulary of {limits.vocab_size}"
    if total > limits.max_model_len:
        return f"position + token_ids: {total} tokens exceed max_model_len {limits.max_model_len}"
    if total > capacity_tokens:
        return f"position + token_ids: {total} tokens exceed the whole KV cache of {capacity_tokens} (kv_cache_tokens)"
    return None


class StepScheduler:
    """Admits steps against the KV budget and packs them into forwards."""

    def __init__(self, cache: KVCache, limits: Limits) -> None:
        self._cache = cache
        self._limits = limits
        self._num_evictions = 0

    def take_num_evictions(self) -> int:
        """Evictions since the last call."""
        taken, self._num_evictions = self._num_evictions, 0
        return taken

    def admit(
        self, wave: SequenceOf[tuple[int, SequenceStep]], now: float
    ) -> tuple[list[Admitted], list[tuple[int, StepOutput]]]:
        """Truncate, make room and reserve blocks for each step in order; the second list answers those left out."""
        admitted: list[Admitted] = []
        answered: list[tuple[int, StepOutput]] = []
        ids = [step.sequence_id for _, step in wave]
        for place, (index, step) in enumerate(wave):
            outcome = self._admit_one(index, step, ids[place + 1 :], ids[:place], now)
            if isinstance(outcome, Admitted):
                admitted.append(outcome)
            else:
                answered.append((index, outcome))
        return admitted, answered

    def _admit_one(
        self, index: int, step: SequenceStep, later: list[str], earlier: list[str], now: float
    ) -> Admitted | StepOutput:
        mistake = find_mistake(step, self._limits, self._cache.capacity_tokens)
        if mistake is not None:
            return StepOutput(step.sequence_id, error=mistake)
        sequence = self._cache.touch(step.sequence_id, now)
        self._cache.truncate(sequence, step.position)
        if step.position == 0:
            self._cache.match_prefix(sequence, step.salt, step.token_ids, step.adapter)
            self._cache.truncate(sequence, len(step.token_ids) - max(1, step.num_logits))  # logits are in no cache
        num_computed = sequence.num_computed_tokens
        start = num_computed - step.position
        stop = min(len(step.token_ids), start + (step.max_computed or len(step.token_ids)))
        if start >= 0 and self._make_room(sequence, step.position + stop, later, earlier):
            self._cache.reserve(sequence, step.position + stop)
            return Admitted(index, step, sequence, start, stop)
        if not num_computed:
            self._cache.free(step.sequence_id)
        return StepOutput(step.sequence_id, num_computed_tokens=num_computed, num_cached_tokens=max(0, start))

    def _make_room(self, sequence: Sequence, num_tokens: int, later: list[str], earlier: list[str]) -> bool:
        """Evict until the sequence can hold `num_tokens`; evicts nothing when that would not be enough."""
        if self._cache.num_missing_blocks(sequence, num_tokens) <= 0:
            return True
        kept = {*earlier, sequence.sequence_id}
        kept_blocks = self._cache.blocks_of(kept)
        if blocks_for(num_tokens) - len(sequence.block_ids) > self._cache.pool.num_blocks - len(kept_blocks):
            return False
        victims = iter(self._victims(kept, kept_blocks, later))
        while self._cache.num_missing_blocks(sequence, num_tokens) > 0:
            self._cache.free(next(victims))
            self._num_evictions += 1
        return True

    def _victims(self, kept: set[str], kept_blocks: set[int], later: list[str]) -> list[str]:
        """Sequences to evict, in this order; not those none of whose blocks would become free."""
        last = set(later)
        outsiders = [s for s in self._cache if s.sequence_id not in kept | last]
        insiders = [s for s in map(self._cache.get, reversed(later)) if s is not None]
        return [s.sequence_id for s in outsiders + insiders if not kept_blocks.issuperset(s.block_ids)]

    def pack(self, admitted: SequenceOf[Admitted]) -> list[list[Chunk]]:
        """Fill forwards of at most `max_num_batched_tokens`, in order; a step that does not fit whole is split."""
        forwards: list[list[Chunk]] = []
        room = 0
        for item in admitted:
            start = item.start
            while start < item.stop:
                if room == 0:
                    forwards.append([])
                    room = self._limits.max_num_batched_tokens
                taken = min(room, item.stop - start)
                forwards[-1].append(Chunk(item, start, start + taken))
                start, room = start + taken, room - taken
        return forwards
