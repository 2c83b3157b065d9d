"""From a list of steps to forwards: who fits, who is evicted, and how tokens are split; knows no tensors and no model.

Steps are admitted in the order of the list, and that order is their priority: when blocks run out, sequences outside
the list go first (least recently stepped), then later steps of the list, last first. So the first step always makes
progress, and an evicted sequence finds out by `held = 0`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from eft_serve.engine.batch import BatchRow
from eft_serve.engine.kv_cache import KVCache, Sequence, blocks_for
from eft_serve.types import SequenceStep, StepOutput


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may ask for."""

    vocab_size: int
    max_model_len: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """A step whose sequence has blocks for all its tokens."""

    index: int  # of the step in the caller's list
    step: SequenceStep
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous part of an admitted step that goes into one forward."""

    admitted: Admitted
    start: int  # into the step's token_ids
    stop: int

    @property
    def num_logits(self) -> int:
        step = self.admitted.step
        first_wanted = len(step.token_ids) - step.num_logits
        return max(0, self.stop - max(self.start, first_wanted))

    def row(self) -> BatchRow:
        step, end = self.admitted.step, self.admitted.step.position + self.stop
        return BatchRow(
            token_ids=step.token_ids[self.start : self.stop],
            position=step.position + self.start,
            block_ids=self.admitted.sequence.block_ids[: blocks_for(end)],
            num_logits=self.num_logits,
            owner=self.admitted.sequence.number,
        )

    def commit(self) -> None:
        """Count the tokens as computed."""
        self.admitted.sequence.num_computed_tokens = self.admitted.step.position + self.stop


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
    if min(step.token_ids) < 0 or max(step.token_ids) >= limits.vocab_size:
        bad = next(t for t in step.token_ids if not 0 <= t < limits.vocab_size)
        return f"token_ids: {bad} is outside the vocabulary of {limits.vocab_size}"
    if total > limits.max_model_len:
        return f"position + token_ids: {total} tokens exceed max_model_len {limits.max_model_len}"
    if total > capacity_tokens:
        return f"position + token_ids: {total} tokens exceed the whole KV cache of {capacity_tokens} (kv_cache_tokens)"
    return None


class Scheduler:
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
        for place, (index, step) in enumerate(wave):
            later = [s.sequence_id for _, s in wave[place + 1 :]]
            outcome = self._admit_one(step, later, {s.sequence_id for _, s in wave[:place]}, now)
            if isinstance(outcome, StepOutput):
                answered.append((index, outcome))
            else:
                admitted.append(Admitted(index, step, outcome))
        return admitted, answered

    def _admit_one(self, step: SequenceStep, later: list[str], earlier: set[str], now: float) -> Sequence | StepOutput:
        mistake = find_mistake(step, self._limits, self._cache.capacity_tokens)
        if mistake is not None:
            return StepOutput(step.sequence_id, error=mistake)
        sequence = self._cache.touch(step.sequence_id, now)
        self._cache.truncate(sequence, step.position)
        total = step.position + len(step.token_ids)
        held = sequence.num_computed_tokens
        if held == step.position and self._make_room(sequence, total, later, earlier):
            self._cache.reserve(sequence, total)
            return sequence
        if not held:
            self._cache.free(step.sequence_id)
        return StepOutput(step.sequence_id, held=held)

    def _make_room(self, sequence: Sequence, num_tokens: int, later: list[str], earlier: set[str]) -> bool:
        """Evict until the sequence can hold `num_tokens`; evicts nobody when that would not be enough."""
        missing = self._cache.num_missing_blocks(sequence, num_tokens)
        if missing <= 0:
            return True
        keep = earlier | {sequence.sequence_id}
        if missing > sum(len(s.block_ids) for s in self._cache if s.sequence_id not in keep):
            return False
        while self._cache.num_missing_blocks(sequence, num_tokens) > 0:
            victim = self._cache.least_recently_stepped(keep.union(later)) or self._last_with_blocks(later)
            self._cache.free(victim)
            self._num_evictions += 1
        return True

    def _last_with_blocks(self, sequence_ids: list[str]) -> str:
        holders = (self._cache.get(sequence_id) for sequence_id in reversed(sequence_ids))
        return next(s.sequence_id for s in holders if s is not None and s.block_ids)

    def pack(self, admitted: SequenceOf[Admitted]) -> list[list[Chunk]]:
        """Fill forwards of at most `max_num_batched_tokens`, in order; a step that does not fit whole is split."""
        forwards: list[list[Chunk]] = []
        room = 0
        for item in admitted:
            start, stop = 0, len(item.step.token_ids)
            while start < stop:
                if room == 0:
                    forwards.append([])
                    room = self._limits.max_num_batched_tokens
                taken = min(room, stop - start)
                forwards[-1].append(Chunk(item, start, start + taken))
                start, room = start + taken, room - taken
        return forwards
