"""Server and client over real sockets, in threads and in processes that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest
import torch
import zmq
from fake_engine import FakeEngine, endpoint_of, serve_in_process
from fan_out_stage import TIMEOUT_S, Stage, assert_answered, batch
from waiting import wait_until

from eft_serve.errors import EngineError
from eft_serve.transport import sockets, wire
from eft_serve.types import SequenceStep, StepBatch


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def test_every_replica_answers_in_the_order_of_its_steps(stage: Stage) -> None:
    for name in ("base", "tuned", "reference"):
        stage.serve(name)
    client = stage.client()
    batches = {"base": batch("a", "evicted", "bad", "b"), "tuned": batch("a"), "reference": batch("a", "b")}
    results = client.fan_out(batches, TIMEOUT_S)
    assert list(results) == list(batches)
    assert_answered(results["tuned"])
    assert_answered(results["reference"], 2)
    base = results["base"]
    assert [output.sequence_id for output in base.outputs] == ["a", "evicted", "bad", "b"]
    assert base.outputs[1].num_computed_tokens == 3
    assert base.outputs[2].error == "token 99 is out of vocabulary"
    assert base.outputs[3].logits is not None
    assert 0 <= base.forward_seconds <= base.seconds < TIMEOUT_S


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_travel_as_they_are(stage: Stage, dtype: torch.dtype) -> None:
    stage.serve("base", FakeEngine(dtype, vocab_size=32))
    logits = stage.client().fan_out({"base": batch("a")}, TIMEOUT_S)["base"].outputs[0].logits
    assert logits is not None
    assert logits.dtype == dtype
    assert logits.tolist() == [[3.0] * 32, [6.0] * 32]


def test_prefill_wants_no_logits_and_freeing_needs_no_steps(stage: Stage) -> None:
    engine = stage.serve("base")
    client = stage.client()
    prefill = StepBatch([SequenceStep("a", 0, [1, 2], 0)])
    result = client.fan_out({"base": prefill}, TIMEOUT_S)["base"]
    assert result.failure is None
    assert result.outputs[0].logits is not None
    assert result.outputs[0].logits.shape == (0, 0)
    assert client.fan_out({"base": StepBatch([], ["a", "b"])}, TIMEOUT_S)["base"].failure is None
    assert engine.freed == ["a", "b"]
    assert engine.forwards == [["a"]]


def hold_two_clients(stage: Stage, first: StepBatch, second: StepBatch) -> list[list[str]]:
    """Both clients' messages arrive while the engine computes something else; the forwards after that."""
    engine = stage.serve("base")
    clients = [stage.client(), stage.client(), stage.client()]
    for client in clients:
        assert_answered(client.fan_out({"base": batch("warm")}, TIMEOUT_S)["base"])
    engine.gate.clear()
    engine.forwards.clear()
    link_of = [client._links["base"] for client in clients]
    now = time.monotonic()
    link_of[0].begin(1000, batch("blocker"), now)
    wait_until(lambda: engine.forwards)
    link_of[1].begin(1001, first, now)
    link_of[2].begin(1002, second, now)
    time.sleep(0.2)
    engine.gate.set()
    for link in link_of:
        wait_until(lambda link=link: link.advance({link._socket, link._connection.monitor}) or not link.waiting)  # type: ignore[misc]
        assert link.finish(TIMEOUT_S).failure is None
    return engine.forwards[1:]


def test_two_clients_become_one_forward(stage: Stage) -> None:
    assert hold_two_clients(stage, batch("a", "b"), batch("c")) in ([["a", "b", "c"]], [["c", "a", "b"]])


def test_a_sequence_that_comes_twice_is_computed_twice(stage: Stage) -> None:
    forwards = hold_two_clients(stage, batch("a", "b"), batch("b"))
    assert sorted(forwards) == [["a", "b"], ["b"]]


def test_a_sequence_is_not_freed_under_a_step_that_came_before(stage: Stage) -> None:
    forwards = hold_two_clients(stage, batch("a"), batch("c", freed=("a",)))
    assert sorted(forwards) in ([["a"], ["c"]], [["c", "a"]])


def test_an_engine_that_raises_fails_everyone_and_goes_on(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.serve("base")
    client, server = stage.client(), stage.servers["base"]
    result = client.fan_out({"base": batch("a", "raise")}, TIMEOUT_S)["base"]
    assert result.failure is not None
    assert "RuntimeError: out of memory" in result.failure
    assert "Traceback" in caplog.text
    with pytest.raises(EngineError, match="out of memory"):
        server.check()
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])
    server.check()


def test_an_engine_that_forgets_a_step_is_a_failure(stage: Stage) -> None:
    stage.serve("base")
    result = stage.client().fan_out({"base": batch("a", "forgotten")}, TIMEOUT_S)["base"]
    assert result.failure is not None
    assert "one by one" in result.failure


def test_the_deadline_holds_and_late_replies_are_discarded(stage: Stage) -> None:
    slow, _ = stage.serve("base"), stage.serve("tuned")
    client = stage.client()
    slow.gate.clear()
    started = time.monotonic()
    results = client.fan_out({"base": batch("a"), "tuned": batch("a")}, 0.3)
    assert 0.3 <= time.monotonic() - started < 3
    assert results["base"].failure is not None
    assert "no answer within 0.3 s" in results["base"].failure
    assert_answered(results["tuned"])
    slow.gate.set()
    time.sleep(0.1)
    assert_answered(client.fan_out({"base": batch("b", "c")}, TIMEOUT_S)["base"], 2)
    assert slow.forwards == [["a"], ["b", "c"]]


def test_what_is_done_meanwhile_holds_no_replica_up(stage: Stage) -> None:
    """It is done when all have been sent their batch, and before anybody's answer is waited for."""
    engines = [stage.serve("base"), stage.serve("tuned")]
    client = stage.client()
    client.fan_out({"base": batch("warm"), "tuned": batch("warm")}, TIMEOUT_S)
    for engine in engines:
        engine.gate.clear()

    def meanwhile() -> None:
        wait_until(lambda: all(engine.forwards[-1] == ["a"] for engine in engines))
        for engine in engines:
            engine.gate.set()

    results = client.fan_out({"base": batch("a"), "tuned": batch("a")}, TIMEOUT_S, meanwhile)
    assert_answered(results["base"])
    assert_answered(results["tuned"])


def test_the_slowest_replica_is_sent_its_batch_first(stage: Stage) -> None:
    for name in ("quick", "slow", "middling"):
        stage.serve(name)
    client = stage.client()
    for name, delay_s in (("slow", 0.3), ("middling", 0.15)):
        stage.engines[name].gate.clear()
        threading.Timer(delay_s, stage.engines[name].gate.set).start()
    batches = {name: batch("a") for name in stage.servers}
    client.fan_out(batches, TIMEOUT_S)
    client.fan_out(batches, TIMEOUT_S)
    order = sorted(batches, key=lambda name: client._links[name]._message_id)
    assert order == ["slow", "middling", "quick"]


def test_an_unknown_replica_is_a_failure(stage: Stage) -> None:
    stage.serve("base")
    results = stage.client().fan_out({"base": batch("a"), "gone": batch("a")}, TIMEOUT_S)
    assert_answered(results["base"])
    assert results["gone"].failure is not None


def test_a_key_that_was_not_allowed_is_refused_at_once_and_later_let_in(stage: Stage) -> None:
    engine = stage.serve("base")
    client, server = stage.client(allowed=False), stage.servers["base"]
    started = time.monotonic()
    result = client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"]
    assert time.monotonic() - started < 5
    assert result.failure is not None
    assert "our key was refused" in result.failure
    assert engine.forwards == []
    server.allow(client.public_key)
    client.set_replicas({"base": endpoint_of(server, "base")})
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])


def test_an_impostor_without_the_servers_key_is_noticed(stage: Stage) -> None:
    engine = stage.serve("base")
    client, endpoint = stage.client(), endpoint_of(stage.servers["base"], "base")
    client.set_replicas({"base": msgspec.structs.replace(endpoint, public_key=zmq.curve_keypair()[0])})
    result = client.fan_out({"base": batch("a")}, 8.0)["base"]
    assert result.failure is not None
    assert engine.forwards == []


def test_a_client_without_curve_gets_nothing(stage: Stage) -> None:
    engine = stage.serve("base")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(stage.servers["base"].address)
        socket.send(wire.encode_request(wire.StepRequest(1, list(batch("a").steps), [])))
        assert socket.poll(500) == 0
    assert engine.forwards == []
    assert_answered(stage.client().fan_out({"base": batch("a")}, TIMEOUT_S)["base"])


def test_malformed_bytes_end_neither_side(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.serve("base")
    client = stage.client()
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])
    raw = client._links["base"]._socket
    for frames in ([b""], [b"\xff" * 50], [b"a", b"b", b"c"], [msgspec.msgpack.encode({"message_id": 1})]):
        raw.send_multipart(frames)
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])
    assert caplog.text.count("dropped a message") == 4
    stage.servers["base"].check()


def test_a_message_beyond_the_limit_costs_its_sender_the_connection(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eft_serve.transport.server.MAX_REQUEST_BYTES", 1000)
    engine = stage.serve("base")
    client = stage.client()
    result = client.fan_out({"base": StepBatch([SequenceStep("a", 0, [7] * 5000, 1)])}, TIMEOUT_S)["base"]
    assert result.failure is not None
    assert "connection lost" in result.failure
    assert engine.forwards == []
    client.set_replicas({"base": endpoint_of(stage.servers["base"], "base")})
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])


def test_nothing_listens_there(stage: Stage) -> None:
    stage.serve("base", start=False)
    endpoint = endpoint_of(stage.servers["base"], "base")
    stage.servers["base"].close()
    client = stage.client()
    client.set_replicas({"base": endpoint})
    started = time.monotonic()
    result = client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"]
    assert time.monotonic() - started < 5
    assert result.failure is not None


def test_leases_end_without_requests(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eft_serve.transport.server.EXPIRE_INTERVAL_S", 0.01)
    engine = stage.serve("base")
    wait_until(lambda: engine.num_expiries >= 2)


def test_closing_is_bounded_and_the_health_check_sees_it(stage: Stage) -> None:
    engine = stage.serve("base")
    client, server = stage.client(), stage.servers["base"]
    server.check()
    engine.gate.clear()
    client.fan_out({"base": batch("a")}, 0.2)
    started = time.monotonic()
    server.close(timeout_s=0.5)
    assert time.monotonic() - started < 3
    engine.gate.set()
    server.close()
    with pytest.raises(EngineError, match="not running"):
        server.check()
    client.close()
    client.close()


def test_replicas_come_and_go(stage: Stage) -> None:
    stage.serve("base")
    client, endpoint = stage.client(), endpoint_of(stage.servers["base"], "base")
    client.set_replicas({})
    assert client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"].failure is not None
    client.set_replicas({"base": endpoint})
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])
    before = client._links["base"]
    client.set_replicas({"base": endpoint})
    assert client._links["base"] is before


def test_a_killed_process_is_a_quick_failure_and_the_others_still_answer(stage: Stage) -> None:
    stage.serve("tuned")
    client = stage.client()
    process, endpoint = serve_in_process(client.public_key, "base")
    stage.stack.callback(process.kill)
    client.set_replicas({"base": endpoint, "tuned": endpoint_of(stage.servers["tuned"], "tuned")})
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])
    killer = threading.Timer(0.5, process.kill)
    killer.start()
    started = time.monotonic()
    results = client.fan_out({"base": batch("sleep"), "tuned": batch("a")}, TIMEOUT_S)
    assert 0.3 < time.monotonic() - started < 2.5
    killer.join()
    assert results["base"].failure is not None
    assert "connection lost" in results["base"].failure
    assert_answered(results["tuned"])
    started = time.monotonic()
    assert client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"].failure is not None
    assert time.monotonic() - started < 1.0
    process.join(10)


def test_a_silent_host_is_noticed_by_its_missing_heartbeats(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HEARTBEAT_INTERVAL_MS", 100)
    monkeypatch.setattr(sockets, "HEARTBEAT_TIMEOUT_MS", 500)
    client = stage.client()
    process, endpoint = serve_in_process(client.public_key, "base")
    stage.stack.callback(process.kill)
    client.set_replicas({"base": endpoint})
    assert_answered(client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"])
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    result = client.fan_out({"base": batch("a")}, TIMEOUT_S)["base"]
    assert time.monotonic() - started < 5
    assert result.failure is not None
    assert "connection lost" in result.failure
