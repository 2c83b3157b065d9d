"""The engine's side: a socket, and the one thread that owns the engine.

Whatever has arrived while the last forward ran is merged into the next, so several coordinators share one batch. Only
clients whose CURVE key was allowed are heard at all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import zmq
from zmq.auth.thread import ThreadAuthenticator

from eft_serve.errors import EngineError
from eft_serve.transport import wire
from eft_serve.types import SequenceStep, StepOutput

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024**2  # 16 million tokens; nobody sends more in a step
IDLE_POLL_MS = 1000  # leases are looked at so often
MAX_FAILURES = 3  # forwards that fail in a row before the engine counts as broken
HEARTBEAT_MS = 2000


class StepHandler(Protocol):
    """What the server steps; called from its thread only."""

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]: ...

    def free(self, sequence_ids: Iterable[str]) -> None: ...

    def expire(self) -> None: ...


class StepServer:
    """Serves one handler.

    Args:
        handler: the engine.
        host: the interface to listen on; the port is a free one.
    """

    def __init__(self, handler: StepHandler, host: str) -> None:
        self._handler = handler
        self._context = zmq.Context()
        self._allowed: set[bytes] = set()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=_Allowed(self._allowed))
        self.public_key, secret_key = zmq.curve_keypair()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key)
        self.address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        self._stopping = threading.Event()
        self._num_failures = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def allow(self, client_public_key: bytes) -> None:
        """Let this client in; from any thread, idempotent."""
        self._allowed.add(client_public_key)

    def check(self) -> None:
        """Raises `EngineError` when the thread has died or the handler keeps failing."""
        if self._error is not None or not self._thread.is_alive():
            raise EngineError(f"the engine's thread has ended: {self._error!r}") from self._error
        if self._num_failures >= MAX_FAILURES:
            raise EngineError(f"the last {self._num_failures} forwards failed")

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the forward that runs now; may be called twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if not self._thread.is_alive():  # a socket must not be closed under a thread that still uses it
            self._authenticator.stop()
            self._socket.close()
            self._context.term()

    def _run(self) -> None:
        try:
            expired_at = time.monotonic()
            while not self._stopping.is_set():
                if self._socket.poll(IDLE_POLL_MS):
                    self._serve(self._drain())
                if time.monotonic() - expired_at >= IDLE_POLL_MS / 1e3:
                    self._handler.expire()
                    expired_at = time.monotonic()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._error = error

    def _drain(self) -> list[tuple[bytes, wire.StepMessage]]:
        """Every message that is here, with its sender; what is no message is dropped."""
        messages = []
        while True:
            try:
                client, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                if len(frames) != 1:
                    raise wire.WireError(f"{len(frames)} frames")
                messages.append((client, wire.decode_message(frames[0])))
            except zmq.Again:
                return messages
            except wire.WireError as error:
                logger.warning("dropped a message: %s", error)

    def _serve(self, messages: Sequence[tuple[bytes, wire.StepMessage]]) -> None:
        """One forward for all of them, one reply to each."""
        started = time.perf_counter()
        try:
            self._handler.free([sequence_id for _, message in messages for sequence_id in message.freed])
            outputs = self._handler.forward([step for _, message in messages for step in message.steps])
        except Exception as error:
            logger.exception("a forward failed")
            self._num_failures += 1
            for client, message in messages:
                self._reply(client, wire.encode_failure(message.message_id, f"{type(error).__name__}: {error}"))
            return
        self._num_failures = 0
        seconds = time.perf_counter() - started
        start = 0
        for client, message in messages:
            end = start + len(message.steps)
            self._reply(client, wire.encode_reply(message.message_id, outputs[start:end], seconds))
            start = end

    def _reply(self, client: bytes, frames: Sequence[bytes | memoryview]) -> None:
        self._socket.send_multipart([client, *frames], copy=False)


class _Allowed:
    """The shape in which pyzmq wants the set of allowed keys."""

    def __init__(self, keys: set[bytes]) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> Any:
        return key in self._keys
