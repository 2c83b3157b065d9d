"""A coordinator's sockets: one batch to each replica, all answers awaited together against one deadline.

It knows replicas by id and not what model they are. A replica's fault is a `StepResult` with a failure and never an
exception; a replica that dies is noticed by its broken connection, long before the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import zmq

from eft_serve.transport.replica_connection import ReplicaConnection
from eft_serve.types import Endpoint, StepBatch, StepResult


class FanOut:
    """All replicas that one coordinator may step. Everything but `public_key` belongs to one thread."""

    def __init__(self) -> None:
        self.public_key, self._secret_key = zmq.curve_keypair()  # Z85; a server must allow the public one
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._links: dict[str, ReplicaConnection] = {}
        self._begun: dict[str, tuple[float, float]] = {}  # by replica id: when, and the seconds that it may take
        self._last_message_id = 0

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        """All replicas that there are now, by replica id: connect the new and the broken ones, drop the others."""
        for replica_id, link in list(self._links.items()):
            if endpoints.get(replica_id) != link.endpoint or link.broken:
                link.close()
                del self._links[replica_id]
        for replica_id in endpoints.keys() - self._links.keys():
            self._links[replica_id] = ReplicaConnection(
                self._context, self._poller, endpoints[replica_id], self.public_key, self._secret_key
            )

    def fan_out(
        self, batches: Mapping[str, StepBatch], timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> Mapping[str, StepResult]:
        """Send every replica its batch, wait for all of them or the deadline; keys are replica ids. Never raises.

        `meanwhile` is called once, when everything has been sent. Logits are views of the received bytes, read them
        before the next call.
        """
        started = time.monotonic()
        links = self._send(batches, started)
        if meanwhile is not None:
            meanwhile()
        while (left_s := started + timeout_s - time.monotonic()) > 0 and any(link.waiting for link in links.values()):
            self._advance(left_s)
        return {replica_id: self._finish(replica_id, timeout_s) for replica_id in batches}

    def begin(self, batches: Mapping[str, StepBatch], timeout_s: float) -> None:
        """Send replicas their batches and wait for none of them. Never raises.

        No other batch may be sent to them until `finished` has given the answer.
        """
        started = time.monotonic()
        self._send(batches, started)
        self._begun |= dict.fromkeys(batches, (started, timeout_s))

    def finished(self) -> Mapping[str, StepResult]:
        """What became of the batches that were begun: each once, when it is answered or its deadline has passed."""
        self._advance(0.0)
        now, results = time.monotonic(), {}
        for replica_id, (started, timeout_s) in list(self._begun.items()):
            link = self._links.get(replica_id)
            if link is None or not link.waiting or now > started + timeout_s:
                del self._begun[replica_id]
                results[replica_id] = self._finish(replica_id, timeout_s)
        return results

    def close(self) -> None:
        """Close every connection; idempotent."""
        self.set_replicas({})
        self._context.destroy(linger=0)

    def _send(self, batches: Mapping[str, StepBatch], started: float) -> Mapping[str, ReplicaConnection]:
        """Begin with each replica that is known, and return those."""
        links = {replica_id: self._links[replica_id] for replica_id in batches if replica_id in self._links}
        for replica_id, link in sorted(links.items(), key=_slowest_first):
            self._last_message_id += 1
            link.begin(self._last_message_id, batches[replica_id], started)
        return links

    def _advance(self, timeout_s: float) -> None:
        """Read what has come, waiting so long for the first of it."""
        timeout_ms = max(1, int(timeout_s * 1000)) if timeout_s else 0
        ready = {socket for socket, _ in self._poller.poll(timeout_ms)}
        for link in self._links.values():
            link.advance(ready)

    def _finish(self, replica_id: str, timeout_s: float) -> StepResult:
        if (link := self._links.get(replica_id)) is None:
            return StepResult(failure="unknown replica: it is gone or was never connected")
        return link.finish(timeout_s)


def _slowest_first(item: tuple[str, ReplicaConnection]) -> float:
    return -item[1].last_seconds
