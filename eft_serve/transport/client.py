"""The coordinator's side: all replicas in one fan-out, one deadline, and no surprise from a replica that dies.

Blocking sockets in the decode loop's thread: an event loop in between would cost more than the round trip.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import zmq
from zmq.utils.monitor import recv_monitor_message

from eft_serve.transport import wire
from eft_serve.types import Endpoint, StepBatch, StepResult

CONNECT_WAIT_S = 1.0  # a replica that is not connected by then has failed this call
CONNECT_POLL_MS = 5
HEARTBEAT_MS = 1000  # a host that vanished is noticed after three of these; a dead process at once
MAX_REPLY_BYTES = 2**31 - 1
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class _Link:
    """A connection to one replica."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, keys: tuple[bytes, bytes]) -> None:
        self.endpoint = endpoint
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a peer that is not there
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self.socket.setsockopt(zmq.CURVE_SERVERKEY, endpoint.public_key)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys[0])
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys[1])
        self.monitor = self.socket.get_monitor_socket(_LOST)
        self.socket.connect(endpoint.address)

    def was_lost(self) -> bool:
        """Whether the connection broke since the last time that this was asked."""
        lost = False
        while self.monitor.poll(0):
            lost = bool(recv_monitor_message(self.monitor)["event"] & _LOST) or lost
        return lost

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


class _Call:
    """One message on its way."""

    def __init__(self, link: _Link, message_id: int, batch: StepBatch) -> None:
        self.link = link
        self.message_id = message_id
        self.payload = wire.encode_message(wire.StepMessage(message_id, list(batch.steps), list(batch.freed)))
        self.sent = False
        link.was_lost()  # whatever broke before this call is not its concern

    def try_send(self) -> bool:
        try:
            self.link.socket.send(self.payload, zmq.NOBLOCK)
            self.sent = True
        except zmq.Again:
            pass
        return self.sent

    def receive(self, seconds: float) -> StepResult | None:
        """This call's answer if it is here; answers to earlier calls, which came too late, are dropped."""
        while True:
            try:
                frames = self.link.socket.recv_multipart(zmq.NOBLOCK, copy=False)
                reply, outputs = wire.decode_reply(frames)
            except zmq.Again:
                return None
            except wire.WireError as error:
                return StepResult(failure=str(error), seconds=seconds)
            if reply.message_id == self.message_id:
                return StepResult(outputs, reply.failure, seconds, reply.forward_seconds)


class FanOut:
    """All replicas of all models. Used by one thread."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._links: dict[str, _Link] = {}
        self._keys = zmq.curve_keypair()
        self._last_message_id = 0

    @property
    def public_key(self) -> bytes:
        """What the servers have to allow; Z85."""
        return self._keys[0]

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Connect the replicas that are new or have moved, drop those that are gone."""
        for replica_id, link in list(self._links.items()):
            if endpoints.get(replica_id) != link.endpoint:
                self._drop(replica_id)
        for replica_id, endpoint in endpoints.items():
            if replica_id not in self._links:
                link = self._links[replica_id] = _Link(self._context, endpoint, self._keys)
                self._poller.register(link.socket, zmq.POLLIN)
                self._poller.register(link.monitor, zmq.POLLIN)

    def fan_out(self, batches: Mapping[str, StepBatch], timeout_s: float) -> Mapping[str, StepResult]:
        """Send every replica its batch and wait for all answers; never raises for a replica's fault.

        The logits of the results are views on received buffers.
        """
        started = time.monotonic()
        results = {r: StepResult(failure="not connected: unknown replica") for r in batches.keys() - self._links.keys()}
        calls = {r: self._call(self._links[r], batch) for r, batch in batches.items() if r in self._links}
        unsent = [call for call in calls.values() if not call.try_send()]
        while calls and (seconds := time.monotonic() - started) < timeout_s:
            unsent = [call for call in unsent if not call.try_send()]
            self._poller.poll(CONNECT_POLL_MS if unsent else math.ceil((timeout_s - seconds) * 1e3))
            done = self._collect(calls, time.monotonic() - started)
            results |= done
            calls = {r: call for r, call in calls.items() if r not in done}
            unsent = [call for call in unsent if call in calls.values()]
        return results | {r: StepResult(failure=f"no answer within {timeout_s:g} s", seconds=timeout_s) for r in calls}

    def close(self) -> None:
        """Drop all connections."""
        for replica_id in list(self._links):
            self._drop(replica_id)
        self._context.term()

    def _call(self, link: _Link, batch: StepBatch) -> _Call:
        self._last_message_id += 1
        return _Call(link, self._last_message_id, batch)

    def _collect(self, calls: Mapping[str, _Call], seconds: float) -> dict[str, StepResult]:
        """Calls that have come to an end: answered, or without hope."""
        done = {}
        for replica_id, call in calls.items():
            result = call.receive(seconds) if call.sent else None
            if result is None and call.link.was_lost():
                result = call.receive(seconds) if call.sent else None  # it may have answered before it went
                result = result or StepResult(failure="connection lost", seconds=seconds)
            if result is None and not call.sent and seconds > CONNECT_WAIT_S:
                result = StepResult(failure=f"not connected within {CONNECT_WAIT_S:g} s", seconds=seconds)
            if result is not None:
                done[replica_id] = result
        return done

    def _drop(self, replica_id: str) -> None:
        link = self._links.pop(replica_id)
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        link.close()
