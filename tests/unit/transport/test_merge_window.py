"""Clients share forwards when they come together, and nobody waits for one that does not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fake_engine import FakeEngine, endpoint_of

from eft_serve.transport import merge_window
from eft_serve.transport.client import FanOut
from eft_serve.transport.merge_window import MAX_WAIT_S, SKIPPED_FORWARDS, MergeWindow
from eft_serve.transport.server import StepServer
from eft_serve.types import SequenceStep, StepBatch

FORWARD_S = 0.02


class SlowEngine(FakeEngine):
    def forward(self, steps):  # type: ignore[no-untyped-def]
        time.sleep(FORWARD_S)
        return super().forward(steps)


@pytest.fixture
def server() -> Iterator[StepServer]:
    server = StepServer(SlowEngine())
    server.start()
    yield server
    server.close()


def connect(stack: ExitStack, server: StepServer) -> FanOut:
    client = FanOut()
    stack.callback(client.close)
    server.allow(client.public_key)
    client.set_replicas({"base": endpoint_of(server, "base")})
    assert client.fan_out({"base": StepBatch([])}, 10.0)["base"].failure is None
    return client


def step_repeatedly(client: FanOut, sequence_id: str, num_steps: int) -> None:
    for _ in range(num_steps):
        assert client.fan_out({"base": StepBatch([SequenceStep(sequence_id, 0, [1], 1)])}, 10.0)["base"].failure is None


def sample(server: StepServer, name: str) -> float:
    value = server.metrics.registry.get_sample_value(name)
    assert value is not None
    return value


def test_who_took_part_is_expected() -> None:
    ours = MergeWindow()
    assert not ours.awaited({b"a"})
    ours.forwarded({b"a", b"b"}, 0.01)
    assert ours.awaited({b"a"}) == {b"b"}
    assert not ours.awaited({b"a", b"b"})
    ours.forwarded({b"a"}, 0.01)
    assert not ours.awaited({b"a"})


def test_who_missed_a_turn_is_excused_for_a_while() -> None:
    ours = MergeWindow()
    ours.forwarded({b"a", b"b"}, 0.01)
    ours.timed_out({b"b"})
    for _ in range(SKIPPED_FORWARDS - 1):
        ours.forwarded({b"a", b"b"}, 0.01)
        assert not ours.awaited({b"a"})
    ours.forwarded({b"a", b"b"}, 0.01)
    assert ours.awaited({b"a"}) == {b"b"}


@pytest.mark.parametrize(("forward_s", "wait_s"), [(10.0, MAX_WAIT_S), (0.01, 0.002), (0.004, 0.0)])
def test_the_wait_is_a_part_of_the_forward(forward_s: float, wait_s: float) -> None:
    ours = MergeWindow()
    ours.forwarded({b"a"}, forward_s)
    assert ours.wait_s == pytest.approx(wait_s)


def test_two_clients_fall_into_step(server: StepServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_window, "MAX_WAIT_S", FORWARD_S)  # however busy the machine is
    monkeypatch.setattr(merge_window, "MAX_WAIT_OF_FORWARD", 1.0)
    with ExitStack() as stack:
        clients = [connect(stack, server) for _ in range(2)]
        threads = [
            threading.Thread(target=step_repeatedly, args=(client, str(index), 20))
            for index, client in enumerate(clients)
        ]
        for thread in threads:
            thread.start()
            time.sleep(FORWARD_S / 2)  # out of step
        for thread in threads:
            thread.join()
    assert sample(server, "eft_messages_per_forward_sum") == 40
    assert sample(server, "eft_messages_per_forward_count") <= 26  # taking turns they are 40, or 39


def test_one_client_alone_does_not_wait(server: StepServer) -> None:
    with ExitStack() as stack:
        one, other = connect(stack, server), connect(stack, server)
        step_repeatedly(one, "a", 3)
        assert sample(server, "eft_merge_wait_seconds_total") == 0
        step_repeatedly(other, "b", 1)
        step_repeatedly(one, "a", 1)
        waited_s = sample(server, "eft_merge_wait_seconds_total")
        assert waited_s > 0
        step_repeatedly(one, "a", 3)
        assert sample(server, "eft_merge_wait_seconds_total") == waited_s


def test_clients_that_never_come_together_wait_once_for_each_other(server: StepServer) -> None:
    with ExitStack() as stack:
        one, other = connect(stack, server), connect(stack, server)
        waited_s = []
        for _ in range(5):
            step_repeatedly(one, "a", 1)
            step_repeatedly(other, "b", 1)
            waited_s.append(sample(server, "eft_merge_wait_seconds_total"))
        assert 0 < waited_s[0] < waited_s[1]
        assert waited_s[1:] == [waited_s[1]] * 4


def test_a_message_without_steps_does_not_wait(server: StepServer) -> None:
    with ExitStack() as stack:
        one, other = connect(stack, server), connect(stack, server)
        step_repeatedly(other, "b", 1)
        assert one.fan_out({"base": StepBatch([], ["a"])}, 10.0)["base"].failure is None
        assert sample(server, "eft_merge_wait_seconds_total") == 0
        assert sample(server, "eft_messages_per_forward_count") == 1
