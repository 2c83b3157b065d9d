"""A client's socket to one listener, and the events of its monitor; knows no messages.

ZeroMQ reconnects by itself, except after a refusal; this module only watches. IMMEDIATE keeps messages out of
connections that do not exist yet, so that nothing old is delivered after a reconnect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from eft_serve.transport.sockets import HANDSHAKE_TIMEOUT_MS, harden
from eft_serve.types import Listener

_BROKEN = {
    zmq.EVENT_DISCONNECTED: "connection lost",
    zmq.EVENT_CLOSED: "nothing listens there",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "our key was refused",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed: not a listener of ours, or another version",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: the listener's key is not the one expected",
}
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED
for _event in _BROKEN:
    _WATCHED |= _event


class Connection:
    """A DEALER socket. All of it belongs to the thread that made it.

    Args:
        listener: where to connect.
        public_key: our own, Z85, which the listener must allow.
        max_message_bytes: a larger message ends the connection.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        listener: Listener,
        public_key: bytes,
        secret_key: bytes,
        max_message_bytes: int,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        harden(self.socket, max_message_bytes)
        self.socket.set(zmq.IMMEDIATE, 1)
        self.socket.set(zmq.CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT_MS)
        self.socket.set(zmq.CURVE_SERVERKEY, listener.public_key)
        self.socket.set(zmq.CURVE_PUBLICKEY, public_key)
        self.socket.set(zmq.CURVE_SECRETKEY, secret_key)
        self.monitor = self.socket.get_monitor_socket(_WATCHED)
        self.socket.connect(listener.address)
        self.ready = False  # there is a connection, as far as the monitor's events were read
        self.broken: str | None = None  # why there is none, if an attempt failed

    def breaks(self) -> Iterator[str]:
        """Read the monitor: the reason of each connection or attempt that has ended since the last call."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            self.ready = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self.ready:
                self.broken = None
                continue
            self.broken = self.broken or _BROKEN[event]  # the first reason is the most telling
            yield self.broken

    def close(self) -> None:
        self.ready = False
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)
