"""A replica is probed beside the others' steps, and nobody waits for its answer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from fake_models import ToyBackend, endpoint
from loop_harness import Harness, naive, prompts_for, request, two_tuned

from eft_serve.coordinator.replica_health import ReplicaHealth
from eft_serve.coordinator.replicas import ReplicaTable
from eft_serve.types import StepOutput, StepResult

NOW = 100.0


@dataclass
class HangingBackend(ToyBackend):
    """What is begun with a hanging replica is not finished."""

    hanging: set[str] = field(default_factory=set)

    def finished(self) -> Mapping[str, StepResult]:
        return {r: self._finished.pop(r) for r in self._finished.keys() - self.hanging}


@pytest.fixture
def backend() -> HangingBackend:
    endpoints = {name: endpoint("base", name) for name in ("a", "b")}
    return HangingBackend(endpoints, connected=endpoints)


@pytest.fixture
def replicas(backend: HangingBackend) -> ReplicaTable:
    table = ReplicaTable()
    table.update(backend.endpoints)
    return table


@pytest.fixture
def health(backend: HangingBackend, replicas: ReplicaTable) -> ReplicaHealth:
    return ReplicaHealth(replicas, backend, timeout_s=10.0)


def healthy(replicas: ReplicaTable) -> list[str]:
    return [name for name, replica in replicas.replicas.items() if replica.healthy]


def test_a_replica_is_used_once_it_has_answered_and_its_probe_is_freed(
    health: ReplicaHealth, replicas: ReplicaTable, backend: HangingBackend
) -> None:
    backend.hanging = {"b"}
    health.check(NOW)
    assert (healthy(replicas), health.is_probing) == (["a"], True)
    backend.hanging = set()
    health.check(NOW)
    assert (healthy(replicas), health.is_probing) == (["a", "b"], False)
    freed = replicas.take_freed()
    assert {name: set(ids) for name, ids in freed.items()} == {n: set(backend.sequences[n]) for n in ("a", "b")}


def test_a_replica_has_one_probe_under_way(health: ReplicaHealth, backend: HangingBackend) -> None:
    backend.hanging = {"a", "b"}
    for _ in range(5):
        health.check(NOW)
    assert len(backend.batches) == 1


def test_a_probe_that_fails_is_repeated_later_and_logged_ever_more_rarely(
    health: ReplicaHealth, replicas: ReplicaTable, backend: HangingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.dead = {"b"}
    now, waits = NOW, []
    for _ in range(8):
        health.check(now)
        waits.append(replicas.replicas["b"].retry_at - now)
        health.check(now + waits[-1] / 2)
        now += waits[-1]
    assert waits == [1, 2, 2, 2, 2, 2, 2, 2]
    assert len(backend.batches) == 8
    probes = {batches["b"].steps[0].sequence_id for batches in backend.batches}
    counts = [record.getMessage() for record in caplog.records]
    assert counts == [f"replica b did not answer {n} times: dead" for n in (1, 2, 4, 8)]
    backend.dead = set()
    health.check(now)
    assert healthy(replicas) == ["a", "b"]
    assert replicas.take_freed()["b"] == [*probes], "an engine may have computed a probe that it answered late"


def test_an_answer_without_room_is_an_answer_and_an_error_is_none(
    health: ReplicaHealth, replicas: ReplicaTable, backend: HangingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.full = {"a"}
    error = StepResult(outputs=[StepOutput("probe", error="token 0 is out of vocabulary")])
    answer = backend.fan_out
    monkeypatch.setattr(backend, "fan_out", lambda batches, timeout_s: {**answer(batches, timeout_s), "b": error})
    health.check(NOW)
    assert healthy(replicas) == ["a"]


def test_the_answer_of_a_replica_that_has_gone_is_dropped(
    health: ReplicaHealth, replicas: ReplicaTable, backend: HangingBackend
) -> None:
    backend.hanging = {"b"}
    health.check(NOW)
    replicas.update({"a": backend.endpoints["a"]})
    backend.hanging = set()
    health.check(NOW)
    assert (healthy(replicas), health.is_probing) == (["a"], False)
    assert "b" not in replicas.freed


def test_a_new_replica_that_hangs_does_not_delay_a_request() -> None:
    backend = HangingBackend(two_tuned(), hanging={"tuned-1"})
    harness = Harness(backend)
    req = request("r", prompts_for(random.Random(1)), max_tokens=9, ignore_eos=True)
    harness.submit(req)
    harness.drive(max_steps=12)
    assert harness.tokens("r") == naive(req)
    assert harness.loop.health.is_probing
    backend.hanging = set()
    harness.drive()
    assert harness.loop.replicas.replicas["tuned-1"].healthy
