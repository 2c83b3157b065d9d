"""The step contract as ZeroMQ frames: a msgpack header, and logits as raw bytes that are not copied on arrival.

They are the second frame, or are in the segment that the request names. This module knows bytes and not sockets.
Nothing here can run code that the other side sent: no pickle, every field typed, every size checked before use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from eft_serve.errors import EngineError
from eft_serve.transport.segment import Segment, SegmentName
from eft_serve.types import SequenceStep, StepOutput

MAX_REQUEST_BYTES = 64 << 20  # token ids and names only
MAX_REPLY_BYTES = 4 << 30
LEAST_SHARED_BYTES = 8 << 10  # fewer are as fast in a frame

Frame = bytes | bytearray | memoryview

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OUTCOMES = ("num_computed_tokens", "error", "logits")  # of a step


class WireError(EngineError):
    """Bytes that are not a message of this contract."""

    code = "malformed_message"


class StepRequest(msgspec.Struct, frozen=True, array_like=True):
    """One coordinator's part of a forward; with no steps it only frees."""

    message_id: int
    steps: list[SequenceStep]
    freed: list[str]
    segment: SegmentName | None = None  # where the logits may be written instead of sending them


class StepReply(msgspec.Struct, frozen=True, array_like=True):
    """One step's outcome: `num_computed_tokens`, `error`, or that many rows of the payload."""

    sequence_id: str
    num_computed_tokens: int | None
    error: str | None
    num_rows: int
    drafted: list[int] = []
    confidences: list[float] = []
    num_cached_tokens: int = 0


class ReplyHeader(msgspec.Struct, frozen=True, array_like=True):
    """What precedes the logits; with a `failure` there are no answers."""

    message_id: int
    answers: list[StepReply]
    dtype: str
    vocab_size: int
    forward_seconds: float
    failure: str | None
    in_segment: bool = False  # the logits are at the start of the request's segment; the frame is empty


@dataclass(frozen=True, slots=True)
class Reply:
    """A decoded reply: outputs in the order of the steps, logits being views of the frame or the segment."""

    message_id: int
    outputs: list[StepOutput]
    forward_seconds: float
    failure: str | None


_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(StepRequest)
_reply_decoder = msgspec.msgpack.Decoder(ReplyHeader)


def encode_request(request: StepRequest) -> bytes:
    return _encoder.encode(request)


def decode_request(frames: Sequence[Frame]) -> StepRequest:
    """Raises `WireError` for anything but one well-formed frame."""
    if len(frames) != 1:
        raise WireError(f"request: {len(frames)} frames; send one")
    try:
        request = _request_decoder.decode(frames[0])
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise WireError(f"request: {error}; run the same version on both sides") from error
    for step in request.steps:
        if step.position < 0 or not 0 <= step.num_logits <= len(step.token_ids):
            raise WireError(f"request: sequence {step.sequence_id!r}: position or num_logits out of range")
        if step.max_computed is not None and step.max_computed < 1:
            raise WireError(f"request: sequence {step.sequence_id!r}: max_computed {step.max_computed} is out of range")
        if step.draft is not None and (step.draft.num_tokens < 1 or step.num_logits < 1):
            raise WireError(
                f"request: sequence {step.sequence_id!r}: draft needs num_tokens and num_logits of at least 1"
            )
    return request


def encode_reply(
    message_id: int, outputs: Sequence[StepOutput], forward_seconds: float, segment: Segment | None = None
) -> list[Frame]:
    """Header and payload; the payload is a copy, so the engine may reuse its own buffers at once.

    Args:
        segment: takes the payload if it has room for it and the client still waits for this message.

    Raises:
        WireError: the outputs' logits differ in width or dtype, or have a dtype that cannot be sent.
    """
    rows = [output.logits.detach() for output in outputs if output.logits is not None and output.logits.numel()]
    answers = [_answer(output) for output in outputs]
    if not rows:
        return [_encoder.encode(ReplyHeader(message_id, answers, "float32", 0, forward_seconds, None)), b""]
    width, dtype = rows[0].shape[1:], rows[0].dtype
    if dtype not in _NAMES or any(r.dim() != 2 or r.shape[1:] != width or r.dtype != dtype for r in rows):
        raise WireError(f"logits: {[(str(r.dtype), tuple(r.shape)) for r in rows]}; want [n, vocab_size] of one dtype")
    shape = (sum(answer.num_rows for answer in answers), *width)
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    header = ReplyHeader(message_id, answers, _NAMES[dtype], shape[1], forward_seconds, None)
    if segment is None or not LEAST_SHARED_BYTES <= num_bytes <= len(segment.data):
        payload = _gather(rows, torch.empty(shape, dtype=dtype))
        return [_encoder.encode(header), payload.view(torch.uint8).numpy().data.cast("B")]
    if segment.message_id != message_id:
        return encode_failure(message_id, "the client has given this message up")
    _gather(rows, torch.frombuffer(segment.data[:num_bytes], dtype=dtype).view(shape))
    return [_encoder.encode(msgspec.structs.replace(header, in_segment=True)), b""]


def encode_failure(message_id: int, message: str) -> list[Frame]:
    return [_encoder.encode(ReplyHeader(message_id, [], "float32", 0, 0.0, message)), b""]


def decode_reply(frames: Sequence[Frame], segment: Segment | None = None) -> Reply:
    """Raises `WireError` for a header that is malformed or does not fit its payload, to the byte.

    Args:
        segment: the one that the request named.
    """
    if len(frames) != 2:
        raise WireError(f"reply: {len(frames)} frames; want header and payload")
    try:
        header = _reply_decoder.decode(frames[0])
    except (msgspec.MsgspecError, ValueError) as error:
        raise WireError(f"reply: {error}; run the same version on both sides") from error
    logits = _payload(header, frames[1], segment)
    outputs = []
    for answer, rows in zip(header.answers, logits.split([answer.num_rows for answer in header.answers]), strict=True):
        has_logits = answer.num_computed_tokens is None and answer.error is None
        outputs.append(
            StepOutput(
                answer.sequence_id,
                num_computed_tokens=answer.num_computed_tokens,
                error=answer.error,
                logits=rows if has_logits else None,
                drafted=answer.drafted if has_logits else (),
                confidences=answer.confidences if has_logits else (),
                num_cached_tokens=answer.num_cached_tokens,
            )
        )
    return Reply(header.message_id, outputs, header.forward_seconds, header.failure)


def _answer(output: StepOutput) -> StepReply:
    if (output.num_computed_tokens is not None) + (output.error is not None) + (output.logits is not None) != 1:
        set_fields = [name for name in _OUTCOMES if getattr(output, name) is not None]
        raise WireError(f"output of {output.sequence_id!r} sets {set_fields}; exactly one of {', '.join(_OUTCOMES)}")
    return StepReply(
        output.sequence_id,
        output.num_computed_tokens,
        output.error,
        num_rows=0 if output.logits is None else output.logits.shape[0],
        drafted=list(output.drafted),
        confidences=list(output.confidences),
        num_cached_tokens=output.num_cached_tokens,
    )


def _gather(rows: Sequence[Tensor], out: Tensor) -> Tensor:
    return torch.cat(rows, out=out) if rows[0].device == out.device else out.copy_(torch.cat(rows))  # type: ignore[arg-type]


def _payload(header: ReplyHeader, frame: Frame, segment: Segment | None) -> Tensor:
    """[num_rows, vocab_size], a view of the frame or the segment."""
    dtype = _DTYPES.get(header.dtype)
    counts = [answer.num_rows for answer in header.answers]
    if dtype is None or header.vocab_size < 0 or any(count < 0 for count in counts):
        raise WireError(f"reply: dtype {header.dtype!r}, vocab_size {header.vocab_size}, rows {counts}")
    for answer in header.answers:
        if (answer.num_computed_tokens is not None) + (answer.error is not None) + (answer.num_rows > 0) > 1:
            raise WireError(f"reply: sequence {answer.sequence_id!r} has more than one of {', '.join(_OUTCOMES)}")
    shape = (sum(counts), header.vocab_size)
    wanted = shape[0] * shape[1] * dtype.itemsize
    payload = memoryview(frame).cast("B")
    if header.in_segment:
        if segment is None or len(payload):
            raise WireError("reply: it points to a segment that was not named, or has a payload besides")
        payload = segment.data[:wanted]
    if len(payload) != wanted:
        raise WireError(f"reply: payload of {len(payload)} bytes for {shape[0]} rows of {shape[1]} {header.dtype}")
    if wanted == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype).view(shape)
