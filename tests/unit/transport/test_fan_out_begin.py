"""Batches that are begun: nobody waits for them, and each has one answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fan_out_stage import TIMEOUT_S, Stage, assert_answered, batch
from waiting import wait_until

from eft_serve.types import StepResult


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def test_a_batch_that_is_begun_holds_up_no_other_and_is_finished_once(stage: Stage) -> None:
    hangs = stage.serve("hangs")
    stage.serve("base")
    hangs.gate.clear()
    client = stage.client()
    client.begin({"hangs": batch("a"), "unknown": batch("a")}, TIMEOUT_S)
    assert list(client.finished()) == ["unknown"]
    for _ in range(3):
        assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])
    assert client.finished() == {}
    hangs.gate.set()
    results: dict[str, StepResult] = {}
    wait_until(lambda: results.update(client.finished()) or results)
    assert_answered(results["hangs"])
    assert client.finished() == {}


def test_a_batch_that_is_begun_fails_at_its_deadline_and_its_late_answer_is_dropped(stage: Stage) -> None:
    hangs = stage.serve("hangs")
    hangs.gate.clear()
    client = stage.client()
    client.begin({"hangs": batch("late")}, 0.05)
    results: dict[str, StepResult] = {}
    wait_until(lambda: results.update(client.finished()) or results)
    assert "no answer within 0.05 s" in str(results["hangs"].failure)
    hangs.gate.set()
    assert_answered(client.fan_out({"hangs": batch("b")}, TIMEOUT_S)["hangs"])


def test_a_batch_that_is_begun_fails_when_its_replica_goes(stage: Stage) -> None:
    stage.serve("hangs").gate.clear()
    client = stage.client()
    client.begin({"hangs": batch("a")}, TIMEOUT_S)
    client.set_replicas({})
    assert "unknown replica" in str(client.finished()["hangs"].failure)
