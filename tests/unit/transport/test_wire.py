"""What is encoded comes back; what is not a message is a typed error."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given

from eft_serve.errors import EngineError
from eft_serve.transport.segment import SegmentName
from eft_serve.transport.wire import (
    StepRequest,
    WireError,
    decode_reply,
    decode_request,
    encode_failure,
    encode_reply,
    encode_request,
)
from eft_serve.types import SequenceStep, StepOutput

names = st.text(max_size=20)
counts = st.integers(0, 2**40)
tokens = st.lists(st.integers(0, 2**31), max_size=8)


@st.composite
def steps(draw: st.DrawFn) -> SequenceStep:
    token_ids = draw(tokens)
    num_logits = draw(st.integers(0, len(token_ids)))
    salt, max_computed = draw(st.none() | names), draw(st.none() | st.integers(1, 2**40))
    adapter = draw(st.none() | names)
    return SequenceStep(draw(names), draw(counts), token_ids, num_logits, salt, max_computed, adapter=adapter)


segments = st.none() | st.builds(SegmentName, counts, counts, st.binary(max_size=16))


@given(counts, st.lists(steps(), max_size=4), st.lists(names, max_size=4), segments)
def test_requests_come_back(
    message_id: int, some_steps: list[SequenceStep], freed: list[str], segment: SegmentName | None
) -> None:
    request = StepRequest(message_id, some_steps, freed, segment)
    assert decode_request([encode_request(request)]) == request


answers = st.one_of(
    st.tuples(st.just("num_computed"), st.integers(0, 2**40)),
    st.tuples(st.just("error"), names),
    st.tuples(st.just("logits"), st.integers(0, 4)),
)


@given(
    st.lists(st.tuples(names, answers), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 9),
    st.floats(0, 1e6),
)
def test_replies_come_back_bit_for_bit(
    some_answers: list[tuple[str, tuple[str, int | str]]], dtype: torch.dtype, vocab_size: int, seconds: float
) -> None:
    outputs = []
    for name, (kind, value) in some_answers:
        num_computed = value if kind == "num_computed" else None
        error = value if kind == "error" else None
        logits = torch.randn(int(value), vocab_size).to(dtype) if kind == "logits" else None
        drafted = list(range(int(value))) if kind == "logits" else []
        confidences = [0.5 / (1 + i) for i in drafted]
        outputs.append(StepOutput(name, num_computed, error, logits, drafted, confidences))  # type: ignore[arg-type]
    reply = decode_reply(encode_reply(7, outputs, seconds))
    assert (reply.message_id, reply.forward_seconds, reply.failure) == (7, seconds, None)
    assert len(reply.outputs) == len(outputs)
    for got, sent in zip(reply.outputs, outputs, strict=True):
        assert (got.sequence_id, got.num_computed_tokens, got.error) == (
            sent.sequence_id,
            sent.num_computed_tokens,
            sent.error,
        )
        assert (list(got.drafted), list(got.confidences)) == (sent.drafted, sent.confidences)
        if sent.logits is None:
            assert got.logits is None
        else:
            assert got.logits is not None
            assert len(got.logits) == len(sent.logits)
            if len(sent.logits):
                assert got.logits.dtype == dtype
                assert torch.equal(got.logits, sent.logits)


def test_a_payload_is_a_copy_and_its_reading_is_not() -> None:
    logits = torch.ones(2, 3)
    header, payload = encode_reply(1, [StepOutput("a", logits=logits)], 0.0)
    logits.zero_()
    received = bytearray(payload)
    got = decode_reply([header, memoryview(received)]).outputs[0].logits
    assert got is not None
    assert got.tolist() == [[1.0] * 3] * 2
    received[:4] = bytes(4)
    assert got[0, 0] == 0


def test_failures_come_back() -> None:
    reply = decode_reply(encode_failure(9, "out of memory"))
    assert (reply.message_id, reply.failure, reply.outputs) == (9, "out of memory", [])


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_noise_is_a_typed_error(header: bytes, payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_request([header])
    with pytest.raises(WireError):
        decode_reply([header, payload])


@given(st.data())
def test_a_flipped_byte_is_another_message_or_a_typed_error(data: st.DataObject) -> None:
    good = [bytearray(frame) for frame in encode_reply(1, [StepOutput("a", logits=torch.ones(2, 3))], 0.5)]
    index = data.draw(st.integers(0, len(good[0]) - 1))
    bad = good[0][:index] + bytes([data.draw(st.integers(0, 255))]) + good[0][index + 1 :]
    try:
        reply = decode_reply([bad, good[1]])
    except WireError:
        return
    assert sum(len(o.logits) for o in reply.outputs if o.logits is not None) <= 2 * 3


@pytest.mark.parametrize("change", [-1, 1, 24])
def test_a_payload_of_another_size_is_refused(change: int) -> None:
    header, payload = encode_reply(1, [StepOutput("a", logits=torch.ones(2, 3))], 0.5)
    resized = (bytearray(payload) + bytes(24))[: len(payload) + change]
    with pytest.raises(WireError, match="payload of"):
        decode_reply([header, resized])


def test_steps_out_of_range_are_refused() -> None:
    for step in (
        SequenceStep("a", -1, [1], 1),
        SequenceStep("a", 0, [1], 2),
        SequenceStep("a", 0, [1], -1),
        SequenceStep("a", 0, [1], 1, max_computed=0),
    ):
        with pytest.raises(WireError, match="out of range"):
            decode_request([encode_request(StepRequest(1, [step], []))])


def test_a_step_without_salt_and_limit_may_leave_both_out() -> None:
    frame = msgspec.msgpack.encode([1, [["a", 0, [5], 1]], []])
    assert decode_request([frame]).steps == [SequenceStep("a", 0, [5], 1, salt=None, max_computed=None)]


def test_the_number_of_frames_is_checked() -> None:
    with pytest.raises(WireError, match="2 frames"):
        decode_request([b"", b""])
    with pytest.raises(WireError, match="1 frames"):
        decode_reply([b""])


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(WireError, match="float64"):
        encode_reply(1, [StepOutput("a", logits=torch.ones(1, 3, dtype=torch.float64))], 0.0)
    with pytest.raises(WireError, match="one dtype"):
        encode_reply(1, [StepOutput("a", logits=torch.ones(1, 3)), StepOutput("b", logits=torch.ones(1, 4))], 0.0)
    with pytest.raises(WireError, match="exactly one"):
        encode_reply(1, [StepOutput("a")], 0.0)
    header = msgspec.msgpack.encode([1, [], "object", 0, 0.0, None])
    with pytest.raises(WireError, match="object"):
        decode_reply([header, b""])
    assert issubclass(WireError, EngineError)
