"""Deltas on real sockets: in order, to the ingress that asked, from those who hold its key only."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import zmq

from eft_serve.transport.deltas import DeltaReceiver, DeltaSender, Part, ReplyTo
from eft_serve.types import Delta, FinishReason

Inbox = queue.SimpleQueue[Sequence[Part]]
TIMEOUT_S = 5.0
SILENCE_S = 0.5


@pytest.fixture
def inbox() -> Inbox:
    return queue.SimpleQueue()


@pytest.fixture
def receiver(inbox: Inbox) -> Iterator[DeltaReceiver]:
    receiver = DeltaReceiver(inbox.put)
    yield receiver
    receiver.close()


@pytest.fixture
def sender() -> Iterator[DeltaSender]:
    sender = DeltaSender()
    yield sender
    sender.close()


def part(request_id: str, num_before: int, text: str, finish: FinishReason | None = None) -> Part:
    return request_id, num_before, Delta(text=text, token_ids=[ord(c) for c in text], finish_reason=finish)


def test_what_is_sent_arrives_in_order(receiver: DeltaReceiver, inbox: Inbox, sender: DeltaSender) -> None:
    messages = [[part("a", step, "x"), part("b", step, "é")] for step in range(200)]
    messages.append([part("a", 200, "", FinishReason.STOP)])
    for message in messages:
        assert sender.send(receiver.reply_to, message)
    assert [list(inbox.get(timeout=TIMEOUT_S)) for _ in messages] == messages


def test_every_ingress_gets_its_own(receiver: DeltaReceiver, inbox: Inbox, sender: DeltaSender) -> None:
    others: Inbox = queue.SimpleQueue()
    other = DeltaReceiver(others.put)
    assert sender.send(receiver.reply_to, [part("mine", 0, "a")])
    assert sender.send(other.reply_to, [part("theirs", 0, "b")])
    assert list(inbox.get(timeout=TIMEOUT_S)) == [part("mine", 0, "a")]
    assert list(others.get(timeout=TIMEOUT_S)) == [part("theirs", 0, "b")]
    other.close()
    assert inbox.empty()
    assert others.empty()


def test_a_stranger_is_not_heard(receiver: DeltaReceiver, inbox: Inbox, sender: DeltaSender) -> None:
    public_key, secret_key = zmq.curve_keypair()
    stranger = msgspec.structs.replace(receiver.reply_to, public_key=public_key, secret_key=secret_key)
    sender.send(stranger, [part("a", 0, "forged")])
    context = zmq.Context()
    plain = context.socket(zmq.PUSH)
    plain.connect(receiver.reply_to.address)
    plain.send(msgspec.msgpack.encode([part("a", 0, "forged")]))
    with pytest.raises(queue.Empty):
        inbox.get(timeout=SILENCE_S)
    context.destroy(linger=0)
    known = DeltaSender()
    known.send(receiver.reply_to, [part("a", 0, "real")])
    assert list(inbox.get(timeout=TIMEOUT_S)) == [part("a", 0, "real")]
    known.close()


def test_a_malformed_message_is_dropped_and_the_next_is_read(
    receiver: DeltaReceiver, inbox: Inbox, sender: DeltaSender
) -> None:
    sender.send(receiver.reply_to, [("a", "not a number", Delta(text="", token_ids=[]))])  # type: ignore[list-item]
    sender.send(receiver.reply_to, [part("a", 0, "real")])
    assert list(inbox.get(timeout=TIMEOUT_S)) == [part("a", 0, "real")]
    receiver.check()


def test_a_full_queue_is_said_at_once(sender: DeltaSender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eft_serve.transport.sockets.QUEUE_MESSAGES", 3)
    public_key, secret_key = zmq.curve_keypair()
    nobody = ReplyTo(address="tcp://127.0.0.1:9", server_key=public_key, public_key=public_key, secret_key=secret_key)
    started = time.monotonic()
    assert [sender.send(nobody, [part("a", i, "x")]) for i in range(5)] == [True] * 3 + [False] * 2
    assert time.monotonic() - started < 1.0


def test_the_secret_is_not_shown(receiver: DeltaReceiver) -> None:
    assert receiver.reply_to.secret_key.decode() not in repr(receiver.reply_to)


def test_a_closed_receiver_says_so(inbox: Inbox) -> None:
    receiver = DeltaReceiver(inbox.put)
    receiver.close()
    receiver.close()
    with pytest.raises(RuntimeError, match="not running"):
        receiver.check()
