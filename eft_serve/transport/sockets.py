"""Options that both ends share: bounded queues, bounded messages, and peers that die are noticed."""

from __future__ import annotations

import zmq

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
