"""What each replica computes in the next step.

There are no prefill and decode modes: every sequence's computed count catches up with its token count, under one token
budget per replica and step. Requests that need one token each go first; long prompts are prefilled and forced tokens
scored beside them, in chunks that do not delay them for long. When a KV budget runs out, the youngest request on that
replica is preempted and computed again later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.pacing import Pacer
from eft_serve.coordinator.replicas import ReplicaTable, could_hold
from eft_serve.coordinator.request import Request, SequenceState
from eft_serve.coordinator.request_queue import FirstComeFirstServed, RequestQueue
from eft_serve.types import Draft, EventKind, SequenceStep, StepBatch

FORCED_ROWS = 32  # forced tokens scored per request and step


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step with its request and sequence; parallel to the steps that a replica gets."""

    request: Request
    sequence: SequenceState
    step: SequenceStep


@dataclass(slots=True)
class SchedulerOutput:
    """One decode step: entries by replica, and the requests that can be sampled after it."""

    entries: dict[str, list[ScheduledStep]] = field(default_factory=dict)
    freed: dict[str, list[str]] = field(default_factory=dict)
    to_sample: list[Request] = field(default_factory=list)
    num_prefill_tokens: int = 0  # on the replica that has the most
    maybe_cached: bool = False  # so the number of computed tokens is not known

    def batches(self) -> dict[str, StepBatch]:
        """The batch for each replica."""
        return {
            replica_id: StepBatch(
                steps=[entry.step for entry in self.entries.get(replica_id, ())],
                freed=self.freed.get(replica_id, ()),
            )
            for replica_id in self.entries.keys() | self.freed.keys()
        }


class Scheduler:
    """Waiting and running requests over a table of replicas."""

    def __init__(self, config: CoordinatorConfig, replicas: ReplicaTable, queue: RequestQueue | None = None) -> None:
        self.config = config
        self.replicas = replicas
        self.waiting: RequestQueue = FirstComeFirstServed() if queue is None else queue  # an empty one is false
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self.pacer = Pacer(config.max_prefill_slowdown, config.max_num_batched_tokens)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def requests(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def take_num_preemptions(self) -> int:
        """Preemptions since the last call."""
        taken, self.num_preemptions = self.num_preemptions, 0
        return taken

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def finish(self, request: Request) -> None:
        """Remove a request, whatever the reason; not an error if it was never added."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.replicas.release(request)

    def schedule(self, now: float) -> SchedulerOutput:
        """The next step. Empty when no request can be stepped."""
        self._place_lost()
        self._ask_for_drafts()
        self._make_room(now)
        self._admit(now)
        scheduled = SchedulerOutput(freed=self.replicas.take_freed())
        budgets = dict.fromkeys(self.replicas.replicas, self.config.max_num_batched_tokens)
        prefills: list[Request] = []
        for request in self.running:
            if request.is_prefilling or request.is_forcing:
                prefills.append(request)
            else:
                self._schedule(request, scheduled, budgets, now)
        if scheduled.entries:  # a decoding request waits for this step
            budgets = {replica_id: min(budget, self.pacer.chunk) for replica_id, budget in budgets.items()}
        left = dict(budgets)
        for request in prefills:
            self._schedule(request, scheduled, left, now)
        scheduled.num_prefill_tokens = max((budgets[r] - left[r] for r in budgets), default=0)
        scheduled.maybe_cached = any(e.step.salt is not None for entries in scheduled.entries.values() for e in entries)
        return scheduled

    def observe(self, scheduled: SchedulerOutput, seconds: float) -> None:
        """Record the time of a scheduled step, from the first send to the last answer."""
        self.pacer.observe(seconds, scheduled.num_prefill_tokens, maybe_cached=scheduled.maybe_cached)

    def lose_replica(self, replica_id: str, now: float) -> None:
        """A replica failed or is gone: its caches have to be computed again, there or elsewhere."""
        if replica := self.replicas.replicas.get(replica_id):
            replica.fail(now)
        for request in self.running:
            if _is_on(request, replica_id):
                request.timeline.add(EventKind.LOST, now)
                request.last_progress = now  # the recovery timeout starts now
            for sequence in request.sequences:
                if sequence.replica_id == replica_id:
                    self.replicas.drop(sequence)
        for request in self.waiting:
            if replica and replica.info.model in request.models:
                request.last_progress = now

    def find_stalled(self, now: float, timeout_s: float) -> list[Request]:
        """Requests that have waited longer than the timeout for a model, not just for their turn."""
        healthy = self.replicas.healthy()
        for request in self.waiting:
            if could_hold(healthy, request):
                request.last_progress = max(request.last_progress, now)
        return [request for request in self.requests if now - request.last_progress > timeout_s]

    def _place_lost(self) -> None:
        lost = [r for r in self.running if any(sequence.replica_id is None for sequence in r.sequences)]
        if lost:
            self.replicas.count_blocks(self.running)
        for request in lost:
            self.replicas.place(request, within_budget=False)

    def _ask_for_drafts(self) -> None:
        """Set what is drafted in this step.

        Forced tokens take the place of draft tokens; the last one is not computed, only scored.
        """
        decoding = [request for request in self.running if not request.is_prefilling]
        num_drawn = sum(not request.is_forcing for request in decoding)
        for request in self.running:
            if request.is_prefilling:
                _drop_drafts(request)
            elif request.is_forcing:
                request.speculation.num_requested = 0
                request.draft_token_ids = request.next_forced(FORCED_ROWS)[:-1]
            else:
                request.speculation.request(len(request.draft_token_ids), request.num_left, num_drawn)

    def _make_room(self, now: float) -> None:
        """Drop draft tokens first, then preempt the youngest requests."""
        self.replicas.count_blocks(self.running)
        for replica_id, replica in self.replicas.replicas.items():
            if replica.blocks > replica.capacity_blocks:
                for request in self.running:
                    if _is_on(request, replica_id):
                        _drop_drafts(request)
                self.replicas.count_blocks(self.running)
            while replica.blocks > replica.capacity_blocks:
                self._preempt(next(r for r in reversed(self.running) if _is_on(r, replica_id)), now)

    def _preempt(self, request: Request, now: float) -> None:
        self.running.remove(request)
        request.drop_draft_tokens()
        self.replicas.release(request)
        self.replicas.count_blocks(self.running)
        self.waiting.add(request)
        request.timeline.add(EventKind.PREEMPTED, now)
        self.num_preemptions += 1

    def _admit(self, now: float) -> None:
        """First come, first served for each model: a waiting request blocks only requests that need the same model."""
        short: set[str] = set()
        for request in self.waiting:
            if len(self.running) == self.config.max_num_seqs:
                break
            if short.isdisjoint(request.models):
                missing = self.replicas.place(request, within_budget=True)
                if not missing:
                    self.waiting.remove(request)
                    self.running.append(request)
                    request.timeline.add(EventKind.SCHEDULED, now)
                elif could_hold(self.replicas.healthy(), request):  # otherwise it blocks no other request
                    short |= missing
            else:
                short |= request.models
        self.running.sort(key=lambda request: request.arrival)

    def _schedule(self, request: Request, scheduled: SchedulerOutput, budgets: dict[str, int], now: float) -> None:
        placed = [(s, s.replica_id) for s in request.sequences if s.replica_id is not None]
        if len(placed) < len(request.sequences):
            return
        wanted = _wanted(request, placed)
        if request.draft_token_ids and any(wanted[replica_id] > budgets[replica_id] for replica_id in wanted):
            request.drop_draft_tokens(
                kept=_num_affordable(request, placed, wanted, budgets) if request.is_forcing else 0
            )
            wanted = _wanted(request, placed)
        final = all(wanted[replica_id] <= budgets[replica_id] for replica_id in wanted)
        if (not final and not request.is_prefilling) or not all(budgets[replica_id] for replica_id in wanted):
            request.last_progress = now  # it only waits for its turn
        num_draft_tokens = len(request.draft_token_ids)
        for sequence, replica_id in placed:
            # The last token waits for the slowest prefill: all models give its logits in the same step.
            pending = request.num_tokens(sequence) + num_draft_tokens - sequence.num_computed_tokens - (not final)
            count = min(pending, budgets[replica_id])
            if count <= 0:
                continue
            budgets[replica_id] -= count
            wanted[replica_id] -= count
            num_logits = num_draft_tokens + 1 - sequence.num_rows if final else 0
            draft = _draft(request, sequence, budgets[replica_id] - wanted[replica_id]) if final else None
            if draft is not None:
                budgets[replica_id] -= draft.num_tokens - 1
            step = _step(request, sequence, count, pending, num_logits, draft)
            scheduled.entries.setdefault(replica_id, []).append(ScheduledStep(request, sequence, step))
        if final:
            scheduled.to_sample.append(request)


def _wanted(request: Request, placed: Sequence[tuple[SequenceState, str]]) -> dict[str, int]:
    """Tokens that each replica computes in the final step; it may have several sequences of the request."""
    wanted: dict[str, int] = {}
    num_draft_tokens = len(request.draft_token_ids)
    for sequence, replica_id in placed:
        count = request.num_tokens(sequence) + num_draft_tokens - sequence.num_computed_tokens
        wanted[replica_id] = wanted.get(replica_id, 0) + count
    return wanted


def _num_affordable(
    request: Request, placed: Sequence[tuple[SequenceState, str]], wanted: Mapping[str, int], budgets: Mapping[str, int]
) -> int:
    """Draft tokens that fit into the budgets: each takes one token per sequence."""
    num_sequences = Counter(replica_id for _, replica_id in placed)
    excess = max(-(-(wanted[r] - budgets[r]) // num_sequences[r]) for r in num_sequences)
    return max(0, len(request.draft_token_ids) - excess)


def _draft(request: Request, sequence: SequenceState, budget: int) -> Draft | None:
    """What this sequence is asked to draft; each draft token but the last is computed and counts in the budget."""
    count = min(request.speculation.num_requested, budget + 1)
    if sequence.term.name != request.speculation.drafter or not count:
        return None
    position = len(request.output_token_ids) + len(request.draft_token_ids) - request.num_scored
    return request.speculation.draft(count, position, request.num_ids)


def _step(
    request: Request, sequence: SequenceState, count: int, pending: int, num_logits: int, draft: Draft | None
) -> SequenceStep:
    """Compute `count` of the `pending` tokens."""
    start = sequence.num_computed_tokens
    if start > 0:
        return SequenceStep(
            sequence.sequence_id,
            start,
            request.tokens_between(sequence, start, start + count),
            num_logits,
            draft=draft,
        )
    # All pending tokens are sent, however few may be computed: the engine looks up its cached prefix in one step.
    return SequenceStep(
        sequence.sequence_id,
        position=0,
        token_ids=request.tokens_between(sequence, 0, pending),
        num_logits=num_logits,
        salt=request.cache_salt,
        max_computed=count if count < pending else None,
        draft=draft,
        adapter=sequence.term.adapter,
    )


def _drop_drafts(request: Request) -> None:
    """Drop the request's draft tokens and ask for none."""
    request.speculation.num_requested = 0
    request.drop_draft_tokens()


def _is_on(request: Request, replica_id: str) -> bool:
    return any(sequence.replica_id == replica_id for sequence in request.sequences)
