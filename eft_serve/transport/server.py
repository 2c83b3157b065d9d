"""An engine's socket: the thread that receives steps, merges what is ready into one forward, and answers.

It knows a `StepHandler` and not what computes behind it. Only clients whose CURVE key was allowed get through the
handshake; the server proves itself to them by its own key.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import zmq

from eft_serve.errors import EngineError
from eft_serve.transport.merge_window import MergeWindow
from eft_serve.transport.metrics import ServerMetrics
from eft_serve.transport.segment import OpenSegments
from eft_serve.transport.sockets import CurveListener
from eft_serve.transport.wire import (
    MAX_REQUEST_BYTES,
    Frame,
    StepRequest,
    WireError,
    decode_request,
    encode_failure,
    encode_reply,
)
from eft_serve.types import SequenceStep, StepOutput

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.2  # how often an idle server looks at its stop flag
EXPIRE_INTERVAL_S = 1.0
MAX_MERGED_MESSAGES = 256
MAX_FORWARD_S = 300.0  # a call that takes longer counts as hanging, and the replica has to be replaced


class StepHandler(Protocol):
    """An engine, as the server sees it; called by one thread."""

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]:
        """Answers in the order of the steps."""
        ...

    def free(self, sequence_ids: Iterable[str]) -> None:
        """Drop sequences; unknown ids are no error."""
        ...

    def expire(self) -> None:
        """Drop sequences whose lease has ended."""
        ...


@dataclass(frozen=True, slots=True)
class _Incoming:
    """A request, and the client to answer."""

    client: bytes
    request: StepRequest

    @property
    def sequence_ids(self) -> set[str]:
        return {step.sequence_id for step in self.request.steps}


class StepServer:
    """Serves a handler from a thread of its own; listens from construction on, answers from `start` on.

    Args:
        handler: what computes the steps; used by the server's thread alone.
        host: the interface to listen on; the system chooses the port.
        bind_address: a whole ZeroMQ address instead, e.g. `ipc:///path`.
    """

    def __init__(self, handler: StepHandler, host: str = "127.0.0.1", bind_address: str | None = None) -> None:
        self._handler = handler
        self._failure: str | None = None
        self._busy_since: float | None = None  # monotonic seconds, while the handler computes
        self._stopping = threading.Event()
        self._next_expiry = 0.0
        self._merge_window = MergeWindow()
        self._segments = OpenSegments()
        self.metrics = ServerMetrics()
        self._listener = CurveListener(zmq.ROUTER, bind_address or f"tcp://{host}:0", MAX_REQUEST_BYTES)
        self._socket = self._listener.socket
        self.address, self.public_key = self._listener.address, self._listener.public_key
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # From any thread.

    def start(self) -> None:
        self._thread.start()

    def allow(self, client_public_key: bytes) -> None:
        """Let this client through from its next handshake on; Z85, idempotent."""
        self._listener.allowed.add(client_public_key)

    def check(self) -> None:
        """Raises `EngineError` while the last forward failed, when one hangs, or when the thread has ended."""
        busy_since = self._busy_since
        if busy_since is not None and (seconds := time.monotonic() - busy_since) > MAX_FORWARD_S:
            raise EngineError(f"a forward has run for {seconds:.0f} s")
        if self._failure is not None:
            raise EngineError(f"the engine failed: {self._failure}")
        if not self._thread.is_alive():
            raise EngineError("the engine's thread is not running")

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the present forward, waiting no longer than `timeout_s`; idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._listener.refuse_all()
        if self._thread.is_alive():
            logger.error(
                "the engine's thread still computes after %g s; its socket is left to the process's end", timeout_s
            )
            return
        self._listener.close()

    # The engine's own thread.

    def run(self) -> None:
        """Receive, merge, compute, answer, until closed."""
        try:
            while not self._stopping.is_set():
                incoming = self._receive()
                started = time.monotonic()
                for merged in _without_duplicates(incoming):
                    self._serve(merged)
                if stepped := {one.client for one in incoming if one.request.steps}:
                    self._merge_window.forwarded(stepped, time.monotonic() - started)
                self._expire()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._failure = f"{type(error).__name__}: {error}"

    def _receive(self) -> list[_Incoming]:
        """All that is ready: waits for the first message, then a moment for the clients that usually step with it."""
        incoming = self._drain(POLL_INTERVAL_S)
        if any(one.request.steps for one in incoming):
            incoming += self._await_others({one.client for one in incoming})
        return incoming

    def _await_others(self, present: Set[bytes]) -> list[_Incoming]:
        joined: list[_Incoming] = []
        wait_s, started = self._merge_window.wait_s, time.monotonic()
        while wait_s and (awaited := self._merge_window.awaited(present | {one.client for one in joined})):
            waited_s = time.monotonic() - started
            if waited_s >= wait_s:
                self._merge_window.timed_out(awaited)
                break
            joined += self._drain(wait_s - waited_s)
            self.metrics.wait_seconds.inc(time.monotonic() - started - waited_s)
        return joined

    def _drain(self, wait_s: float) -> list[_Incoming]:
        """What is ready; waits at most `wait_s` for the first message."""
        incoming: list[_Incoming] = []
        wait_ms = math.ceil(wait_s * 1000)
        while len(incoming) < MAX_MERGED_MESSAGES and self._socket.poll(wait_ms):
            wait_ms = 0
            client, *frames = self._socket.recv_multipart()
            try:
                incoming.append(_Incoming(client, decode_request(frames)))
            except WireError as error:
                logger.warning("dropped a message: %s", error)
        return incoming

    def _serve(self, merged: list[_Incoming]) -> None:
        """One forward for all of these clients; what it raises fails these messages and does not end the thread."""
        self._busy_since = time.monotonic()
        try:
            replies = self._compute(merged)
            self._failure = None
        except Exception as error:
            logger.exception("a forward failed")
            self._failure = f"{type(error).__name__}: {error}"
            replies = [encode_failure(incoming.request.message_id, self._failure) for incoming in merged]
        finally:
            self._busy_since = None
        for incoming, frames in zip(merged, replies, strict=True):
            self.metrics.socket_bytes.inc(memoryview(frames[1]).nbytes)
            self._socket.send_multipart([incoming.client, *frames], copy=False)

    def _compute(self, merged: list[_Incoming]) -> list[list[Frame]]:
        requests = [incoming.request for incoming in merged]
        if freed := [sequence_id for request in requests for sequence_id in request.freed]:
            self._handler.free(freed)
        steps = [step for request in requests for step in request.steps]
        started = time.perf_counter()
        outputs = self._handler.forward(steps) if steps else []
        seconds = time.perf_counter() - started
        if [output.sequence_id for output in outputs] != [step.sequence_id for step in steps]:
            raise EngineError(f"{len(outputs)} outputs do not answer {len(steps)} steps one by one")
        if steps:
            self.metrics.messages_per_forward.observe(sum(bool(request.steps) for request in requests))
        remaining = iter(outputs)
        return [
            encode_reply(
                one.request.message_id,
                [next(remaining) for _ in one.request.steps],
                seconds,
                self._segments.find(one.client, one.request.segment),
            )
            for one in merged
        ]

    def _expire(self) -> None:
        if (now := time.monotonic()) >= self._next_expiry:
            self._next_expiry = now + EXPIRE_INTERVAL_S
            self._handler.expire()
            self._segments.forget_idle()


def _without_duplicates(incoming: Iterable[_Incoming]) -> Iterator[list[_Incoming]]:
    """Merge in order of arrival; a sequence that comes again, or was freed meanwhile, starts the next forward."""
    merged: list[_Incoming] = []
    seen: set[str] = set()
    for one in incoming:
        if seen & (one.sequence_ids | set(one.request.freed)):
            yield merged
            merged, seen = [], set()
        merged.append(one)
        seen |= one.sequence_ids
    if merged:
        yield merged
