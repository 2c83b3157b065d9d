"""Sequences are placed by one rule, whether they are to begin now or could ever be held."""

from __future__ import annotations

import pytest
from fake_models import endpoint
from loop_harness import request

from eft_serve.coordinator.replicas import Replica, ReplicaTable, assign, longest_output
from eft_serve.errors import ContextLengthError

BLOCK = 4


def replica(kv_tokens: int, max_len: int = 512) -> Replica:
    return Replica(endpoint("base", "base-0", kv_tokens=kv_tokens, max_len=max_len, block=BLOCK).info, share=1)


def table(*kv_tokens: int, max_len: int = 512) -> ReplicaTable:
    found = ReplicaTable()
    found.update(
        {f"base-{i}": endpoint("base", f"base-{i}", kv_tokens=n, max_len=max_len) for i, n in enumerate(kv_tokens)}
    )
    for each in found.replicas.values():
        each.succeed()
    return found


@pytest.mark.parametrize(
    ("capacities", "used", "lengths", "chosen"),
    [
        ([40, 40], [0, 0], [10], [0]),
        ([40, 40], [5, 0], [10], [1]),  # the emptier one
        ([40, 80], [5, 5], [10], [1]),  # by part of the budget, not by blocks
        ([40, 40], [0, 0], [10, 30], [1, 0]),  # the longest first
        ([40], [0], [20, 20], [0, 0]),
        ([40], [0], [20, 21], None),  # whole blocks
        ([40, 40], [9, 9], [8], None),
        ([], [], [1], None),
        ([40], None, [80], [0]),  # by load alone
    ],
)
def test_sequences_are_assigned_longest_first_to_the_emptiest_replica_with_room(
    capacities: list[int], used: list[int] | None, lengths: list[int], chosen: list[int] | None
) -> None:
    assert assign([replica(n) for n in capacities], lengths, used) == chosen


def test_a_replica_with_a_short_context_gets_no_long_sequence() -> None:
    replicas = [replica(400, max_len=8), replica(40)]
    assert assign(replicas, [20], [0, 9]) is None
    assert assign(replicas, [20], [0, 0]) == [1]


def test_a_request_is_placed_whole_or_not_at_all() -> None:
    replicas = table(40)
    two = request("r", {"base": [1] * 20, "base@told": [1] * 21}, {"base": 0.5, "base@told": 0.5})
    assert replicas.place(two, within_budget=True) == {"base"}
    assert [s.replica_id for s in two.sequences] == [None, None]
    assert replicas.replicas["base-0"].blocks == 0
    assert replicas.place(two, within_budget=False) == set()
    assert [s.replica_id for s in two.sequences] == ["base-0", "base-0"]
    assert replicas.replicas["base-0"].blocks == 11


def test_a_replica_that_failed_is_given_nothing_until_it_answers() -> None:
    replicas = table(40)
    replicas.replicas["base-0"].fail(now=0.0)
    one = request("r", {"base": [1]}, {"base": 1.0})
    assert replicas.place(one, within_budget=False) == {"base"}
    assert (replicas.due(0.5), replicas.due(1.0)) == ([], ["base-0"])
    replicas.replicas["base-0"].succeed()
    assert replicas.place(one, within_budget=True) == set()


def test_the_pause_after_a_failure_doubles_and_ends_at_two_seconds() -> None:
    failing = replica(40)
    pauses = []
    for _ in range(9):
        failing.fail(now=0.0)
        pauses.append(failing.retry_at)
    assert pauses == [1.0, *[2.0] * 8]


def test_the_longest_output_is_what_all_prompts_can_grow_by_together() -> None:
    assert longest_output([replica(40)], [10], wanted=100) == 30
    assert longest_output([replica(40)], [10, 10], wanted=100) == 10
    assert longest_output([replica(40), replica(40)], [10, 10], wanted=100) == 30
    assert longest_output([replica(40)], [10], wanted=5) == 5


def test_a_prompt_that_no_replica_could_hold_is_refused_by_name() -> None:
    with pytest.raises(ContextLengthError, match="model base holds 40 tokens"):
        table(40).context_left(request("r", {"base": [1] * 40}, {"base": 1.0}))


def test_freed_sequences_are_sent_to_healthy_replicas_and_kept_for_the_others() -> None:
    replicas = table(40, 40)
    one = request("r", {"base": [1]}, {"base": 1.0})
    replicas.place(one, within_budget=True)
    replica_id = one.sequences[0].replica_id
    assert replica_id is not None
    replicas.replicas[replica_id].fail(now=0.0)
    replicas.release(one)
    assert replicas.take_freed() == {}
    replicas.replicas[replica_id].succeed()
    assert replicas.take_freed() == {replica_id: ["r/base"]}
    replicas.give_back_freed(replica_id, ["r/base"])
    assert replicas.take_freed() == {replica_id: ["r/base"]}
