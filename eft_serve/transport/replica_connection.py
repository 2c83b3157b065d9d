"""One replica's connection: at most one message under way, and what became of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence, Set
from typing import Any

import zmq

from eft_serve.transport import segment
from eft_serve.transport.connection import Connection
from eft_serve.transport.segment import Segment
from eft_serve.transport.wire import (
    LEAST_SHARED_BYTES,
    MAX_REPLY_BYTES,
    Reply,
    StepRequest,
    WireError,
    decode_reply,
    encode_request,
)
from eft_serve.types import Endpoint, SequenceStep, StepBatch, StepOutput, StepResult

logger = logging.getLogger(__name__)

_WIDEST_ITEM_BYTES = 4  # of the logits' dtypes


class ReplicaConnection:
    """A socket to one replica. All its methods belong to the thread that made it."""

    def __init__(
        self, context: zmq.Context[Any], poller: zmq.Poller, endpoint: Endpoint, public_key: bytes, secret_key: bytes
    ) -> None:
        self.endpoint = endpoint
        self._poller = poller
        self._connection = Connection(context, endpoint, public_key, secret_key, MAX_REPLY_BYTES)
        self._socket = self._connection.socket
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._connection.monitor, zmq.POLLIN)
        self._message_id = 0
        self._steps: Sequence[SequenceStep] = ()
        self._segment: Segment | None = None
        self._unsent: bytes | None = None
        self._started = 0.0
        self._result: StepResult | None = StepResult(failure="not connected yet")

    @property
    def waiting(self) -> bool:
        """A message is under way and has not ended."""
        return self._result is None

    @property
    def last_seconds(self) -> float:
        """How long the last message took; 0 before there was one."""
        return self._result.seconds if self._result is not None else 0.0

    @property
    def broken(self) -> bool:
        """The connection, or the last attempt at one, failed."""
        self._watch()
        return self._connection.broken is not None

    def begin(self, message_id: int, batch: StepBatch, started: float) -> None:
        """Send a batch, or keep it until the connection is made."""
        self._message_id, self._steps, self._started, self._result = message_id, batch.steps, started, None
        self._grow(sum(map(_most_rows, batch.steps)) * self.endpoint.info.vocab_size * _WIDEST_ITEM_BYTES)
        name = None
        if self._segment is not None:
            self._segment.message_id, name = message_id, self._segment.name
        self._unsent = encode_request(StepRequest(message_id, list(batch.steps), list(batch.freed), name))
        self._send()
        if self._unsent is not None:
            self._poller.register(self._socket, zmq.POLLIN | zmq.POLLOUT)

    def advance(self, ready: Set[object]) -> None:
        """Read what is there: answers first, then whether the connection ended."""
        if self._socket in ready:
            self._send()
            self._receive()
        if self._connection.monitor in ready:
            self._watch()

    def finish(self, timeout_s: float) -> StepResult:
        """The answer, or the failure to get one in time."""
        self._unsent = None
        self._poller.register(self._socket, zmq.POLLIN)
        result = self._result or self._failed(f"no answer within {timeout_s:g} s")
        self._steps = ()
        self._result = result
        return result

    def close(self) -> None:
        self._poller.unregister(self._socket)
        self._poller.unregister(self._connection.monitor)
        self._connection.close()
        self._drop_segment()

    def _grow(self, num_bytes: int) -> None:
        """Make sure of a segment for a reply of this size, where one is possible and pays off."""
        room = 0 if self._segment is None else len(self._segment.data)
        if not segment.SUPPORTED or not max(room + 1, LEAST_SHARED_BYTES) <= num_bytes <= segment.MAX_BYTES:
            return
        self._drop_segment()
        try:
            self._segment = Segment.create(num_bytes)
        except OSError as error:
            logger.debug("no shared memory for %s: %s", self.endpoint.address, error)

    def _drop_segment(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _send(self) -> None:
        if self._unsent is None:
            return
        try:
            self._socket.send(self._unsent, zmq.NOBLOCK)
        except zmq.Again:
            if self._connection.broken is not None:
                self._result = self._failed(self._connection.broken)
            return
        self._unsent = None
        self._poller.register(self._socket, zmq.POLLIN)

    def _receive(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                reply = decode_reply([frame.buffer for frame in frames], self._segment)
            except WireError as error:
                if self.waiting:
                    self._result = self._failed(error.message)
                continue
            if self.waiting and reply.message_id == self._message_id:
                self._result = self._accept(reply)

    def _accept(self, reply: Reply) -> StepResult:
        if reply.failure is not None:
            return self._failed(reply.failure)
        if len(reply.outputs) != len(self._steps) or not all(map(_answers, reply.outputs, self._steps)):
            return self._failed("the reply does not answer the steps one by one")
        return StepResult(
            outputs=reply.outputs, seconds=time.monotonic() - self._started, forward_seconds=reply.forward_seconds
        )

    def _watch(self) -> None:
        for reason in self._connection.breaks():
            if self.waiting:
                self._receive()
            if self.waiting:
                self._result = self._failed(reason)

    def _failed(self, reason: str) -> StepResult:
        return StepResult(failure=f"{self.endpoint.address}: {reason}", seconds=time.monotonic() - self._started)


def _most_rows(step: SequenceStep) -> int:
    return step.num_logits + (step.draft.num_tokens - 1 if step.draft else 0)


def _answers(output: StepOutput, step: SequenceStep) -> bool:
    if output.sequence_id != step.sequence_id or not 0 <= output.num_cached_tokens <= len(step.token_ids):
        return False
    if output.logits is None:
        return not output.drafted and not output.confidences
    fewest, most = (1, step.draft.num_tokens) if step.draft else (0, 0)
    if step.draft and step.draft.sampling.grammar is not None:
        fewest = 0  # it may still be compiled, or allow no token
    num_drafted = len(output.drafted)
    if not fewest <= num_drafted <= most or len(output.confidences) != num_drafted:
        return False
    return output.logits.shape[0] == step.num_logits + max(0, num_drafted - 1)
