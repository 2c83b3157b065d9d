"""What a coordinator emits, on its way to the ingresses: one message for each ingress and decode step, one way only.

It knows deltas and not requests. An ingress listens; only a process with the key that it hands out through Ray gets
through the handshake and may send. Every delta says how many tokens went before it, so that a loss is always noticed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import msgspec
import zmq

from eft_serve.transport.sockets import CurveListener, harden
from eft_serve.types import Delta

logger = logging.getLogger(__name__)

POLL_INTERVAL_MS = 200  # how often an idle receiver looks at its stop flag
MAX_MESSAGE_BYTES = 64 << 20

Part = tuple[str, int, Delta]  # request id, how many of its tokens went before, and what comes now


class ReplyTo(msgspec.Struct, frozen=True, kw_only=True):
    """Where an ingress listens, and the keys to send there. The secret one goes to coordinators only, through Ray."""

    address: str
    server_key: bytes  # CURVE, Z85
    public_key: bytes  # of the sender
    secret_key: bytes

    def __repr__(self) -> str:
        return f"ReplyTo({self.address})"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Part])


class DeltaReceiver:
    """Listens from construction on, in a thread of its own.

    Args:
        deliver: called in that thread with what one message brought.
        host: the interface; the system chooses the port.
    """

    def __init__(self, deliver: Callable[[Sequence[Part]], None], host: str = "127.0.0.1") -> None:
        self._deliver = deliver
        self._stopping = threading.Event()
        public_key, secret_key = zmq.curve_keypair()
        self._listener = CurveListener(zmq.PULL, f"tcp://{host}:0", MAX_MESSAGE_BYTES)
        self._listener.allowed.add(public_key)
        self._socket = self._listener.socket
        self.reply_to = ReplyTo(
            address=self._listener.address,
            server_key=self._listener.public_key,
            public_key=public_key,
            secret_key=secret_key,
        )
        self._thread = threading.Thread(target=self._run, name="deltas", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `RuntimeError` when the thread has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the receiver of deltas is not running")

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop; idempotent."""
        self._stopping.set()
        self._thread.join(timeout_s)
        self._listener.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._socket.poll(POLL_INTERVAL_MS):
                try:
                    parts = _decoder.decode(self._socket.recv())
                except (msgspec.MsgspecError, ValueError) as error:
                    logger.error("dropped a message that does not fit the contract: %s", error)
                    continue
                self._deliver(parts)


class DeltaSender:
    """Connections to ingresses, made at first use; all of it belongs to one thread."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def send(self, reply_to: ReplyTo, parts: Sequence[Part]) -> bool:
        """Queue them for this ingress; false when its queue is full, so that they are lost."""
        socket = self._sockets.get(reply_to.address) or self._connect(reply_to)
        try:
            socket.send(_encoder.encode(parts), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Wait a moment until what is queued is sent; idempotent."""
        self._context.destroy(linger=1000)

    def _connect(self, reply_to: ReplyTo) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        harden(socket, MAX_MESSAGE_BYTES)
        socket.set(zmq.CURVE_SERVERKEY, reply_to.server_key)
        socket.set(zmq.CURVE_PUBLICKEY, reply_to.public_key)
        socket.set(zmq.CURVE_SECRETKEY, reply_to.secret_key)
        socket.connect(reply_to.address)
        self._sockets[reply_to.address] = socket
        return socket
