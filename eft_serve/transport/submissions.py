"""How requests reach a coordinator: it listens, ingresses submit and abort, and it reports the outcome.

Tokens go another way, see `deltas`. Only clients with an allowed key get through the handshake. A client whose
connection has ended is noticed within `LOOK_INTERVAL_S`: the next connection of the same process is another client.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable
from typing import Protocol

import msgspec
import zmq

from eft_serve.errors import EftServeError, EngineError, to_failure
from eft_serve.transport.sockets import CurveListener
from eft_serve.types import Failure, GenerationRequest

logger = logging.getLogger(__name__)

POLL_INTERVAL_MS = 200  # notices from other threads are delayed by at most this
LOOK_INTERVAL_S = 1.0
MAX_SUBMISSION_BYTES = 64 << 20
MAX_NOTICE_BYTES = 1 << 20
STILL_THERE = b""  # carries nothing; if it cannot be sent, the client is gone


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A new request."""

    request: GenerationRequest
    reply_address: str  # where its deltas go


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nobody reads its deltas any more."""

    request_id: str


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """The state of a request: it was taken, it failed, or its last delta was sent."""

    request_id: str
    failure: Failure | None = None
    finished: bool = False


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Submit | Abort)
_notice_decoder = msgspec.msgpack.Decoder(Notice)


def encode(message: Submit | Abort) -> bytes:
    return _encoder.encode(message)


def decode_notice(message: bytes) -> Notice | None:
    """None when it only checks the connection; raises `msgspec.MsgspecError` or `ValueError` if malformed."""
    return None if message == STILL_THERE else _notice_decoder.decode(message)


class RequestHandler(Protocol):
    """Takes requests; called by the server's thread, which knows a client as a few bytes."""

    def submit(self, client: bytes, submission: Submit) -> None:
        """Take it; what this raises is the request's failure."""
        ...

    def abort(self, client: bytes, request_id: str) -> None:
        """End a request of this client; other ids are no error."""
        ...

    def clients(self) -> set[bytes]:
        """Clients with open requests."""
        ...

    def lose(self, client: bytes) -> None:
        """This client is gone, and reads nothing any more."""
        ...


class SubmissionServer:
    """Listens from construction on, answers from `start` on in a thread of its own.

    Args:
        handler: takes the requests.
        host: the interface; the system chooses the port.
    """

    def __init__(self, handler: RequestHandler, host: str = "127.0.0.1") -> None:
        self._handler = handler
        self._stopping = threading.Event()
        self._notices: queue.SimpleQueue[tuple[bytes, Notice]] = queue.SimpleQueue()
        self._next_look = 0.0  # monotonic seconds
        self._listener = CurveListener(zmq.ROUTER, f"tcp://{host}:0", MAX_SUBMISSION_BYTES)
        self._socket = self._listener.socket
        self._socket.set(zmq.ROUTER_MANDATORY, 1)  # what cannot be sent is an error
        self.address, self.public_key = self._listener.address, self._listener.public_key
        self._thread = threading.Thread(target=self._run, name="submissions", daemon=True)

    # From any thread.

    def start(self) -> None:
        self._thread.start()

    def allow(self, client_public_key: bytes) -> None:
        """Let this client through from its next handshake on; Z85, idempotent."""
        self._listener.allowed.add(client_public_key)

    def notify(self, notices: Iterable[tuple[bytes, Notice]]) -> None:
        """Tell clients the state of their requests."""
        for item in notices:
            self._notices.put(item)

    def check(self) -> None:
        """Raises `RuntimeError` when the thread has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the server of submissions is not running")

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop; idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._listener.close()

    # The server's own thread.

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._socket.poll(POLL_INTERVAL_MS):
                self._receive()
            while not self._notices.empty():
                client, notice = self._notices.get()
                self._send(client, _encoder.encode(notice))
            self._look_for_clients()

    def _receive(self) -> None:
        client, *frames = self._socket.recv_multipart()
        try:
            message = _decoder.decode(b"".join(frames))
        except (msgspec.MsgspecError, ValueError) as error:
            logger.error("dropped a message that does not fit the contract: %s", error)
            return
        if isinstance(message, Abort):
            self._handler.abort(client, message.request_id)
        else:
            notice = Notice(message.request.request_id, self._submit(client, message))
            self._send(client, _encoder.encode(notice))

    def _submit(self, client: bytes, submission: Submit) -> Failure | None:
        try:
            self._handler.submit(client, submission)
        except EftServeError as error:
            return to_failure(error)
        except Exception:  # one request's fault must not end the thread that serves all
            logger.exception("request %s could not be taken", submission.request.request_id)
            return to_failure(EngineError("the request could not be taken; the coordinator's log says why"))
        return None

    def _look_for_clients(self) -> None:
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + LOOK_INTERVAL_S
            for client in self._handler.clients():
                self._send(client, STILL_THERE)

    def _send(self, client: bytes, message: bytes) -> None:
        try:
            self._socket.send_multipart([client, message], zmq.NOBLOCK)
        except zmq.Again:
            logger.error("an ingress does not read what becomes of its requests")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._handler.lose(client)
