"""What the messages look like: a msgpack header, and the logits behind it as one raw frame. Nothing is pickled.

All rows of a reply share a dtype and a vocabulary, so they travel as one contiguous block in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor
from zmq import Frame

from eft_serve.types import SequenceStep, StepOutput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WireError(Exception):
    """Bytes that are no message of ours."""


class StepMessage(msgspec.Struct, frozen=True, array_like=True):
    """From a coordinator to an engine."""

    message_id: int
    steps: list[SequenceStep]
    freed: list[str]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """One step's `StepOutput` without its logits."""

    sequence_id: str
    held: int | None
    error: str | None
    num_rows: int


class StepReply(msgspec.Struct, frozen=True, array_like=True):
    """From an engine to a coordinator; the logits follow as a second frame when there are any rows."""

    message_id: int
    answers: list[Answer]
    dtype: str
    vocab_size: int
    forward_seconds: float
    failure: str | None = None  # the engine could not compute; no answers then


_encoder = msgspec.msgpack.Encoder()
_message_decoder = msgspec.msgpack.Decoder(StepMessage)
_reply_decoder = msgspec.msgpack.Decoder(StepReply)

encode_message = _encoder.encode


def decode_message(frame: bytes | memoryview) -> StepMessage:
    """Raises `WireError`."""
    try:
        return _message_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"not a step message: {error}") from error


def encode_failure(message_id: int, failure: str) -> list[bytes]:
    """Frames of a reply without answers."""
    return [_encoder.encode(StepReply(message_id, [], "", 0, 0.0, failure))]


def encode_reply(message_id: int, outputs: Sequence[StepOutput], forward_seconds: float) -> list[bytes | memoryview]:
    """Frames of a reply; at most one copy of the logits."""
    answers = [Answer(o.sequence_id, o.held, o.error, 0 if o.logits is None else o.logits.shape[0]) for o in outputs]
    blocks = [o.logits for o in outputs if o.logits is not None and o.logits.shape[0]]
    if not blocks:
        return [_encoder.encode(StepReply(message_id, answers, "", 0, forward_seconds))]
    logits = (torch.cat(blocks) if len(blocks) > 1 else blocks[0]).detach().cpu().contiguous()
    dtype = str(logits.dtype).removeprefix("torch.")
    header = StepReply(message_id, answers, dtype, logits.shape[-1], forward_seconds)
    return [_encoder.encode(header), logits.view(torch.uint8).numpy().data.cast("B")]


def decode_reply(frames: Sequence[Frame]) -> tuple[StepReply, list[StepOutput]]:
    """The reply and its outputs; logits are views on the received frame. Raises `WireError`."""
    try:
        reply = _reply_decoder.decode(frames[0].buffer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"not a step reply: {error}") from error
    rows = _rows(reply, frames[1].buffer if len(frames) > 1 else None)
    outputs, start = [], 0
    for answer in reply.answers:
        logits = None
        if answer.held is None and answer.error is None:
            logits = rows[start : start + answer.num_rows]
            start += answer.num_rows
        outputs.append(StepOutput(answer.sequence_id, answer.held, answer.error, logits))
    return reply, outputs


def _rows(reply: StepReply, payload: memoryview | None) -> Tensor:
    num_rows = sum(answer.num_rows for answer in reply.answers)
    if payload is None:
        if num_rows:
            raise WireError(f"a reply announces {num_rows} rows of logits and brings none")
        return torch.empty(0, 0)
    dtype = DTYPES.get(reply.dtype)
    if dtype is None or len(payload) != num_rows * reply.vocab_size * dtype.itemsize:
        raise WireError(f"{len(payload)} bytes are not {num_rows} rows of {reply.vocab_size} × {reply.dtype}")
    return torch.frombuffer(payload, dtype=dtype).view(num_rows, reply.vocab_size)
