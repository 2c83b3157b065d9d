"""Options that both ends share: bounded queues, bounded messages, and peers that die are noticed."""

from __future__ import annotations

import logging
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000  # a silent host; a killed process is noticed at once by TCP itself
HANDSHAKE_TIMEOUT_MS = 5000
QUEUE_MESSAGES = 1000


def harden(socket: zmq.Socket[bytes], max_message_bytes: int) -> None:
    """Before bind or connect. A larger message ends the connection that it came by."""
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, QUEUE_MESSAGES)
    socket.set(zmq.RCVHWM, QUEUE_MESSAGES)
    socket.set(zmq.MAXMSGSIZE, max_message_bytes)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)


class AllowedKeys(set[bytes]):
    """Clients' public keys, in the form that pyzmq's authenticator asks for."""

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self


class CurveListener:
    """A bound socket that only clients with an allowed key get through to, and that proves itself by its own.

    Args:
        kind: a ZeroMQ socket type.
        address: to bind to.
        max_message_bytes: a larger message ends the connection that it came by.
    """

    def __init__(self, kind: int, address: str, max_message_bytes: int) -> None:
        self.allowed = AllowedKeys()  # from the next handshake on
        self.public_key, secret_key = zmq.curve_keypair()
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context, log=logger)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=self.allowed)
        self.socket = self._context.socket(kind)
        harden(self.socket, max_message_bytes)
        self.socket.set(zmq.CURVE_SERVER, 1)
        self.socket.set(zmq.CURVE_SECRETKEY, secret_key)
        self.socket.bind(address)
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)

    def refuse_all(self) -> None:
        """No more handshakes; idempotent."""
        self._authenticator.stop()

    def close(self) -> None:
        """Idempotent; no thread may use the socket any longer."""
        self.refuse_all()
        self._context.destroy(linger=0)
