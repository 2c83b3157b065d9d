"""Logits by shared memory: the right rows or the socket, nobody else's memory, and nothing left behind."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from fake_engine import FakeEngine, endpoint_of
from hypothesis import given
from torch import Tensor
from waiting import wait_until

from eft_serve.transport import segment as segments
from eft_serve.transport.client import FanOut
from eft_serve.transport.segment import OpenSegments, Segment, SegmentName
from eft_serve.transport.server import StepServer
from eft_serve.transport.wire import LEAST_SHARED_BYTES, WireError, decode_reply, encode_failure, encode_reply
from eft_serve.types import Endpoint, SequenceStep, StepBatch, StepOutput

TIMEOUT_S = 20.0
VOCAB = 4096  # one row is past the threshold


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def segment(stack: ExitStack) -> Segment:
    created = Segment.create(1 << 16)
    stack.callback(created.close)
    return created


def serve(stack: ExitStack) -> tuple[FakeEngine, StepServer]:
    engine = FakeEngine(vocab_size=VOCAB)
    server = StepServer(engine)
    stack.callback(server.close)
    stack.callback(engine.gate.set)
    server.start()
    return engine, server


def connect(stack: ExitStack, server: StepServer) -> FanOut:
    client = FanOut()
    stack.callback(client.close)
    server.allow(client.public_key)
    client.set_replicas({"base": endpoint_of(server, "base", VOCAB)})
    return client


def step(client: FanOut, *tokens: int, timeout_s: float = TIMEOUT_S) -> list[Tensor]:
    """Rows of one sequence for each token; every row holds its sequence's token."""
    batch = StepBatch([SequenceStep(f"s{index}", 0, [token], 1) for index, token in enumerate(tokens)])
    result = client.fan_out({"base": batch}, timeout_s)["base"]
    assert result.failure is None
    return [output.logits for output in result.outputs if output.logits is not None]


def assert_rows(rows: list[Tensor], *tokens: int) -> None:
    assert [row.unique().tolist() for row in rows] == [[float(token)] for token in tokens]


def socket_bytes(server: StepServer) -> float:
    value = server.metrics.registry.get_sample_value("eft_socket_logits_bytes_total")
    assert value is not None
    return value


def num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:eft-serve")


# One segment.


def test_what_one_side_writes_the_other_reads(segment: Segment) -> None:
    opened = Segment.open(segment.name)
    opened.data[:5] = b"hello"
    assert bytes(segment.data[:5]) == b"hello"
    assert len(opened.data) == len(segment.data) >= 1 << 16
    segment.message_id = 2**63 + 5
    assert opened.message_id == 2**63 + 5


def test_it_has_no_name_in_any_file_system(segment: Segment) -> None:
    assert os.fstat(segment.name.fd).st_nlink == 0
    assert os.readlink(f"/proc/self/fd/{segment.name.fd}").startswith("/memfd:")


def test_it_can_neither_shrink_nor_grow_nor_be_unsealed(segment: Segment) -> None:
    for size in (0, 1 << 24):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.name.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.name.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_another_nonce_process_or_descriptor_is_refused(segment: Segment) -> None:
    name = segment.name
    replace = msgspec.structs.replace
    for wrong in (
        replace(name, nonce=bytes(16)),
        replace(name, nonce=b""),
        replace(name, nonce=name.nonce[:15]),
        replace(name, pid=os.getppid()),
        replace(name, pid=2**40),
        replace(name, pid=-1),
        replace(name, fd=2**40),
    ):
        with pytest.raises(OSError):  # noqa: PT011  # whichever the system says
            Segment.open(wrong)


def test_a_closed_one_is_out_of_reach_and_an_open_one_stays(segment: Segment) -> None:
    made = Segment.create(10)
    opened = Segment.open(made.name)
    made.close()
    with pytest.raises(OSError):  # noqa: PT011
        Segment.open(made.name)
    opened.data[:1] = b"x"
    assert bytes(made.data[:1]) == b"x"


def pretender(kind: str, tmp_path: Path) -> int:
    """A descriptor of something that is no segment, and bears the nonce where it can."""
    if kind == "pipe":
        return os.pipe()[0]
    if kind == "device":
        return os.open("/dev/null", os.O_RDWR)
    if kind == "file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    else:
        fd = os.memfd_create("pretender", os.MFD_ALLOW_SEALING)
    if kind != "empty":
        os.write(fd, b"n" * 16 + bytes(1 << 16))
    if kind == "of another user":
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        os.fchown(fd, 12345, -1)
    return fd


@pytest.mark.parametrize("kind", ["pipe", "device", "file", "unsealed", "empty", "of another user"])
def test_something_else_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "of another user" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    fd = pretender(kind, tmp_path)
    try:
        with pytest.raises(OSError):  # noqa: PT011
            Segment.open(SegmentName(os.getpid(), fd, b"n" * 16))
    finally:
        os.close(fd)


def test_a_server_tries_once_and_follows_its_client(segment: Segment, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "eft_serve")
    opened = OpenSegments()
    wrong = msgspec.structs.replace(segment.name, nonce=bytes(16))
    assert [opened.find(b"a", wrong) for _ in range(3)] == [None] * 3
    assert caplog.text.count("out of reach") == 1
    assert opened.find(b"a", None) is None
    first = opened.find(b"a", segment.name)
    assert first is not None
    assert opened.find(b"a", segment.name) is first
    other = Segment.create(10)
    second = opened.find(b"a", other.name)
    assert second is not None
    assert second.name == other.name
    other.close()
    assert len(opened) == 1


# One reply.


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_replies_come_back_bit_for_bit(counts: list[int], dtype: torch.dtype) -> None:
    made = Segment.create(1 << 20)
    outputs = [StepOutput(str(i), logits=torch.randn(count, 8192).to(dtype)) for i, count in enumerate(counts)]
    outputs.insert(1, StepOutput("partial", num_computed_tokens=4))
    made.message_id = 7
    frames = encode_reply(7, outputs, 0.5, Segment.open(made.name))
    made.close()
    assert len(frames[1]) == 0
    reply = decode_reply(frames, made)
    for got, sent in zip(reply.outputs, outputs, strict=True):
        assert (got.sequence_id, got.num_computed_tokens) == (sent.sequence_id, sent.num_computed_tokens)
        if sent.logits is not None:
            assert got.logits is not None
            assert got.logits.dtype == dtype
            assert torch.equal(got.logits, sent.logits)


def test_what_is_small_or_does_not_fit_goes_by_the_socket(segment: Segment) -> None:
    segment.message_id = 1
    small = torch.ones(1, LEAST_SHARED_BYTES // 4 - 1)
    large = torch.ones(1, len(segment.data) // 4 + 1)
    for logits in (small, large):
        frames = encode_reply(1, [StepOutput("a", logits=logits)], 0.0, segment)
        got = decode_reply(frames, None).outputs[0].logits
        assert got is not None
        assert torch.equal(got, logits)
    assert not any(segment.data)
    full = encode_reply(1, [StepOutput("a", logits=large[:, :-1])], 0.0, segment)
    assert len(full[1]) == 0


def test_nothing_is_written_for_a_message_that_was_given_up(segment: Segment) -> None:
    segment.message_id = 2
    frames = encode_reply(1, [StepOutput("a", logits=torch.ones(1, VOCAB))], 0.0, segment)
    assert frames == encode_failure(1, "the client has given this message up")
    assert not any(segment.data)


def test_a_header_cannot_point_where_nothing_was_offered(segment: Segment) -> None:
    segment.message_id = 1
    frames = encode_reply(1, [StepOutput("a", logits=torch.ones(1, VOCAB))], 0.0, segment)
    with pytest.raises(WireError, match="segment"):
        decode_reply(frames, None)
    with pytest.raises(WireError, match="segment"):
        decode_reply([frames[0], b"more"], segment)
    fields = msgspec.msgpack.decode(frames[0])
    fields[3] = len(segment.data)  # four bytes each: beyond the end
    with pytest.raises(WireError, match="payload of"):
        decode_reply([msgspec.msgpack.encode(fields), b""], segment)


# Server and client.


def test_rows_come_without_the_socket(stack: ExitStack) -> None:
    _, server = serve(stack)
    client = connect(stack, server)
    for token in range(3):
        assert_rows(step(client, token, token + 1), token, token + 1)
    assert socket_bytes(server) == 0
    assert len(server._segments) == 1


def test_a_segment_out_of_reach_costs_nothing_but_time(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "eft_serve")
    _, server = serve(stack)
    client = connect(stack, server)
    link = client._links["base"]
    link._grow(VOCAB * 4)
    assert link._segment is not None
    with open("/dev/null") as null:
        os.dup2(null.fileno(), link._segment.name.fd)
    assert_rows(step(client, 5), 5)
    assert_rows(step(client, 6), 6)
    assert socket_bytes(server) == 2 * VOCAB * 4
    assert caplog.text.count("out of reach") == 1


def test_it_grows_with_the_batch_and_old_rows_stay_readable(stack: ExitStack) -> None:
    _, server = serve(stack)
    client = connect(stack, server)
    before = num_mappings()
    few = step(client, 1)
    many = step(client, *range(100))
    assert_rows(many, *range(100))
    assert_rows(few, 1)
    assert_rows(step(client, 7), 7)
    assert socket_bytes(server) == 0
    del few
    assert num_mappings() - before == 2  # one segment, mapped by both sides


def test_late_rows_never_land_on_those_of_a_later_message(stack: ExitStack) -> None:
    engine, server = serve(stack)
    client = connect(stack, server)
    assert_rows(step(client, 1), 1)
    for token in range(10, 20):
        engine.gate.clear()
        late = StepBatch([SequenceStep("late", 0, [99], 1)])
        assert client.fan_out({"base": late}, 0.02)["base"].failure is not None
        link = client._links["base"]
        link.begin(1000 + token, StepBatch([SequenceStep("s0", 0, [token], 1)]), time.monotonic())
        engine.gate.set()
        wait_until(lambda link=link: link.advance({link._socket, link._connection.monitor}) or not link.waiting)  # type: ignore[misc]
        rows = [output.logits for output in link.finish(TIMEOUT_S).outputs if output.logits is not None]
        assert_rows(rows, token)
        time.sleep(0.02)
        assert_rows(rows, token)


def test_two_clients_have_a_segment_each(stack: ExitStack) -> None:
    _, server = serve(stack)
    one, two = connect(stack, server), connect(stack, server)
    first, second = step(one, 1, 2), step(two, 3, 4)
    assert_rows(first, 1, 2)
    assert_rows(second, 3, 4)
    assert len(server._segments) == 2


def step_for_ever(endpoint: Endpoint, pipe: Connection) -> None:
    client = FanOut()
    pipe.send(client.public_key)
    pipe.recv()
    client.set_replicas({"base": endpoint})
    while True:
        step(client, 1, 2, 3)
        with suppress(BrokenPipeError):
            pipe.send(None)


def test_a_killed_client_leaves_nothing(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "IDLE_S", 0.3)
    monkeypatch.setattr("eft_serve.transport.server.EXPIRE_INTERVAL_S", 0.05)
    mapped_before = num_mappings()
    _, server = serve(stack)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=step_for_ever, args=(endpoint_of(server, "base", VOCAB), theirs), daemon=True)
    process.start()
    stack.callback(process.kill)
    assert ours.poll(60)
    server.allow(ours.recv())
    ours.send(None)
    for _ in range(3):
        assert ours.poll(60)
        ours.recv()
    assert socket_bytes(server) == 0
    assert num_mappings() == mapped_before + 1
    process.kill()
    process.join(10)
    wait_until(lambda: len(server._segments) == 0)
    wait_until(lambda: num_mappings() == mapped_before)
    server.check()
