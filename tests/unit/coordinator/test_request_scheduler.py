"""The scheduler by itself: what each replica computes next, who waits, and who gives way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from fake_models import endpoint
from loop_harness import EFT, request

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.replicas import ReplicaTable
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.request_queue import FirstComeFirstServed
from eft_serve.coordinator.scheduler import Scheduler, SchedulerOutput
from eft_serve.types import EventKind, SequenceStep, Speculative

ONE = {"base": 1.0}
NOW = 100.0


def scheduler_of(
    models: Mapping[str, int] = dict.fromkeys(EFT, 1), kv_tokens: int = 4096, **config: int | float
) -> Scheduler:
    """One with so many healthy replicas of each model, in blocks of four tokens."""
    replicas = ReplicaTable()
    ids = [(model, f"{model}-{i}") for model, count in models.items() for i in range(count)]
    replicas.update({replica_id: endpoint(model, replica_id, kv_tokens=kv_tokens) for model, replica_id in ids})
    for replica in replicas.replicas.values():
        replica.succeed()
    return Scheduler(CoordinatorConfig.model_validate(config), replicas)


def one(request_id: str, num_tokens: int = 1, **kwargs: object) -> Request:
    """A request of the base alone, that came in the order of its name."""
    now = NOW + float(request_id[1:])
    return request(request_id, {"base": list(range(num_tokens))}, ONE, now=now, **kwargs)  # type: ignore[arg-type]


def add(scheduler: Scheduler, *requests: Request) -> None:
    for each in requests:
        scheduler.add(each)


def compute(scheduled: SchedulerOutput) -> None:
    """As if the engines had answered everything, each request with the token 7."""
    for entry in (entry for entries in scheduled.entries.values() for entry in entries):
        end = entry.step.position + (entry.step.max_computed or len(entry.step.token_ids))
        entry.sequence.num_computed_tokens = end
    for each in scheduled.to_sample:
        each.take([7])


def steps_of(scheduled: SchedulerOutput, replica_id: str = "base-0") -> dict[str, SequenceStep]:
    """By request."""
    return {entry.request.request_id: entry.step for entry in scheduled.entries.get(replica_id, ())}


def kinds(req: Request) -> list[EventKind]:
    return [event.kind for event in req.timeline.events]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler, long = scheduler_of(max_num_batched_tokens=8), one("r0", 20)
    add(scheduler, long)
    chunks = []
    while not long.output_token_ids:
        scheduled = scheduler.schedule(NOW)
        step = steps_of(scheduled)["r0"]
        chunks.append((step.position, step.max_computed or len(step.token_ids), step.num_logits))
        compute(scheduled)
    assert chunks == [(0, 8, 0), (8, 8, 0), (16, 4, 1)]


def test_requests_that_decode_go_first_and_prefills_take_what_is_left() -> None:
    scheduler, decoding, long = scheduler_of(max_num_batched_tokens=8), one("r0"), one("r1", 20)
    add(scheduler, decoding)
    compute(scheduler.schedule(NOW))
    add(scheduler, long)
    for _ in range(3):
        scheduled = scheduler.schedule(NOW)
        assert decoding in scheduled.to_sample
        assert sum(step.max_computed or len(step.token_ids) for step in steps_of(scheduled).values()) <= 8
        compute(scheduled)
    assert long.sequences[0].num_computed_tokens > 0


def test_a_request_is_sampled_once_its_slowest_model_has_its_prompt() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=8)
    uneven = request("r0", {"base": [1] * 3, "reference": [1] * 3, "tuned": [1] * 12}, now=NOW)
    add(scheduler, uneven)
    first = scheduler.schedule(NOW)
    assert first.to_sample == []
    assert steps_of(first, "base-0")["r0"].token_ids == [1, 1], "its last token waits for the others"
    compute(first)
    second = scheduler.schedule(NOW)
    assert second.to_sample == [uneven]
    assert [steps_of(second, f"{model}-0")["r0"].num_logits for model in EFT] == [1, 1, 1]


def test_the_tuned_model_alone_is_asked_for_draft_tokens() -> None:
    scheduler = scheduler_of()
    drafted = request("r0", {m: [1] for m in EFT}, now=NOW, speculative=Speculative(num_tokens=3))
    add(scheduler, drafted)
    compute(scheduler.schedule(NOW))
    scheduled = scheduler.schedule(NOW)
    drafts = {model: steps_of(scheduled, f"{model}-0")["r0"].draft for model in EFT}
    assert drafts["base"] is drafts["reference"] is None
    assert drafts["tuned"] is not None
    assert (drafts["tuned"].num_tokens, drafts["tuned"].position) == (3, 1)


@pytest.mark.parametrize(("batch_size", "num_requested"), [(2, 3), (1, 0)])
def test_nothing_is_drafted_while_more_than_a_batch_decode(batch_size: int, num_requested: int) -> None:
    scheduler = scheduler_of()
    settings = Speculative(num_tokens=3, disable_by_batch_size=batch_size)
    both = [request(f"r{i}", {m: [1] for m in EFT}, now=NOW, speculative=settings) for i in range(2)]
    add(scheduler, *both)
    compute(scheduler.schedule(NOW))
    scheduler.schedule(NOW)
    assert [each.speculation.num_requested for each in both] == [num_requested] * 2


def test_forced_tokens_are_scored_many_at_a_time() -> None:
    scheduler, forced = scheduler_of(), one("r0", 5, forced_token_ids=list(range(50)))
    add(scheduler, forced)
    compute(scheduler.schedule(NOW))
    step = steps_of(scheduler.schedule(NOW))["r0"]
    assert step.num_logits == 32


def test_the_youngest_request_is_preempted_where_room_runs_out_and_waits_by_its_arrival() -> None:
    scheduler = scheduler_of(kv_tokens=24)  # six blocks
    old, young, late = one("r0", 11), one("r1", 11), one("r2", 4)
    add(scheduler, old, young)
    compute(scheduler.schedule(NOW))
    compute(scheduler.schedule(NOW))
    add(scheduler, late)
    scheduler.schedule(NOW + 1)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young, late], "who was preempted came before"
    assert kinds(young) == [EventKind.QUEUED, EventKind.SCHEDULED, EventKind.PREEMPTED]
    assert scheduler.take_num_preemptions() == 1
    assert scheduler.take_num_preemptions() == 0


def test_draft_tokens_give_way_before_a_request_does() -> None:
    scheduler = scheduler_of(models={"base": 1, "tuned": 1}, kv_tokens=24)
    two = [
        request(f"r{i}", {m: [1] * 10 for m in ("base", "tuned")}, {"base": 0.5, "tuned": 0.5}, now=NOW + i)
        for i in range(2)
    ]
    for each in two:
        each.speculation.drafter, each.speculation.settings = "tuned", Speculative(num_tokens=8)
    add(scheduler, *two)
    compute(scheduler.schedule(NOW))
    scheduler.schedule(NOW)
    assert scheduler.running == two
    assert [each.speculation.num_requested for each in two] == [0, 0]


def test_no_more_requests_run_than_may() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    three = [one(f"r{i}") for i in range(3)]
    add(scheduler, *three)
    scheduler.schedule(NOW)
    assert scheduler.running == three[:2]
    assert list(scheduler.waiting) == three[2:]
    assert [event.kind for event in three[2].timeline.events] == [EventKind.QUEUED]


def test_who_waits_for_one_model_does_not_hold_up_those_that_need_another() -> None:
    scheduler = scheduler_of(models={"base": 1, "tuned": 1}, kv_tokens=16)
    running = one("r0", 14)
    waits, next_one = one("r1", 10), one("r2", 1)
    other = request("r3", {"tuned": [1]}, {"tuned": 1.0}, now=NOW + 3)
    add(scheduler, running, waits, next_one, other)
    scheduler.schedule(NOW)
    assert scheduler.running == [running, other]
    assert list(scheduler.waiting) == [waits, next_one], "a later one of the same model does not overtake"


def test_sequences_of_a_lost_replica_are_computed_on_another() -> None:
    scheduler, req = scheduler_of(models={"base": 2}), one("r0", 6)
    add(scheduler, req)
    compute(scheduler.schedule(NOW))
    lost = req.sequences[0].replica_id
    assert lost is not None
    scheduler.lose_replica(lost, NOW + 5)
    scheduled = scheduler.schedule(NOW + 5)
    (other,) = {"base-0", "base-1"} - {lost}
    step = steps_of(scheduled, other)["r0"]
    assert (step.position, step.token_ids) == (0, [0, 1, 2, 3, 4, 5, 7])
    assert kinds(req)[-1] == EventKind.LOST
    assert req.last_progress == NOW + 5


def test_a_request_without_its_model_stalls_and_one_that_waits_for_its_turn_does_not() -> None:
    scheduler = scheduler_of(models={"base": 1, "tuned": 1}, max_num_seqs=1)
    without, turn = request("r0", {"tuned": [1]}, {"tuned": 1.0}, now=NOW), one("r1")
    add(scheduler, without, turn)
    scheduler.lose_replica("tuned-0", NOW)
    assert scheduler.find_stalled(NOW + 30, timeout_s=10) == [without]


def test_an_end_frees_its_caches_once_their_replica_answers() -> None:
    scheduler, req = scheduler_of(models={"base": 1}), one("r0", 4)
    add(scheduler, req)
    compute(scheduler.schedule(NOW))
    scheduler.finish(req)
    scheduler.replicas.replicas["base-0"].healthy = False
    assert scheduler.schedule(NOW).freed == {}
    scheduler.replicas.replicas["base-0"].succeed()
    assert scheduler.schedule(NOW).freed == {"base-0": ["r0/base"]}
    assert len(scheduler) == 0


def test_an_end_of_a_request_that_was_never_added_changes_nothing() -> None:
    scheduler = scheduler_of()
    add(scheduler, one("r0"))
    scheduler.finish(one("r1"))
    assert len(scheduler) == 1


def test_a_queue_that_is_given_decides_who_is_admitted_next() -> None:
    class LastComeFirstServed(FirstComeFirstServed):
        def __iter__(self) -> Iterator[Request]:
            return reversed(list(super().__iter__()))

    scheduler = scheduler_of(max_num_seqs=1)
    scheduler = Scheduler(scheduler.config, scheduler.replicas, LastComeFirstServed())
    first, last = one("r0"), one("r1")
    add(scheduler, first, last)
    scheduler.schedule(NOW)
    assert scheduler.running == [last]
