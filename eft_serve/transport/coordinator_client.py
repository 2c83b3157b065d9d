"""An ingress's connections to the coordinators: which one gets the next request, and whether it still works on it.

It belongs to an event loop and needs no thread: a request leaves without a hop. Nothing is lost silently: a
request that is not taken in time, whose coordinator goes away, or whose last delta does not come, fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import zmq

from eft_serve.errors import CoordinatorLostError, EftServeError, UnavailableError, from_failure
from eft_serve.transport.connection import Connection
from eft_serve.transport.submissions import MAX_NOTICE_BYTES, Abort, Notice, Submit, decode_notice, encode
from eft_serve.types import GenerationRequest, Listener

logger = logging.getLogger(__name__)

TAKEN_TIMEOUT_S = 5.0
LATE_DELTAS_S = 5.0  # after the coordinator said that it has sent the last

Fail = Callable[[str, EftServeError], None]


@dataclass(slots=True, eq=False)
class _CoordinatorConnection:
    """One coordinator."""

    listener: Listener
    connection: Connection
    listed: bool = True  # may be given requests
    last_turn: int = 0
    timers: dict[str, asyncio.TimerHandle | None] = field(default_factory=dict)  # by open request

    @property
    def rank(self) -> tuple[int, int]:
        """The least gets the next request: fewest open ones, then the longest time since the last one."""
        return len(self.timers), self.last_turn


class CoordinatorClient:
    """Made and used on one event loop.

    Args:
        fail: called with each request that fails, and the reason; not for one that has ended meanwhile.
    """

    def __init__(self, fail: Fail) -> None:
        self.public_key, self._secret_key = zmq.curve_keypair()  # Z85; coordinators must allow the public one
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._links: dict[str, _CoordinatorConnection] = {}
        self._homes: dict[str, _CoordinatorConnection] = {}  # by open request
        self._num_turns = 0

    @property
    def ready(self) -> bool:
        """A coordinator is connected."""
        return any(link.listed and link.connection.ready for link in self._links.values())

    def set_coordinators(self, listeners: Mapping[str, Listener]) -> None:
        """All coordinators that there are now: connect the new and the broken ones; others finish what they have."""
        for replica_id, link in list(self._links.items()):
            self._read(link)
            link.listed = listeners.get(replica_id) == link.listener
            if link.connection.broken is not None or not (link.listed or link.timers):
                self._close(link)
                del self._links[replica_id]
        for replica_id in listeners.keys() - self._links.keys():
            self._connect(listeners[replica_id])

    def submit(self, request: GenerationRequest, reply_address: str) -> None:
        """Send it to a coordinator; call `end` however it ends.

        Raises:
            UnavailableError: none is connected, or the one that is takes nothing.
        """
        links = [link for link in self._links.values() if link.listed and link.connection.ready]
        if not links:
            raise UnavailableError("no coordinator can be reached; try again later")
        link = min(links, key=lambda link: link.rank)
        try:
            link.connection.socket.send(encode(Submit(request, reply_address)), zmq.NOBLOCK)
        except zmq.Again as error:
            raise UnavailableError("the coordinator takes no requests; try again later") from error
        self._num_turns += 1
        link.last_turn = self._num_turns
        self._homes[request.request_id] = link
        self._expect(link, request.request_id, TAKEN_TIMEOUT_S, "the coordinator does not answer; try again later")
        self._read(link)

    def end(self, request_id: str, *, complete: bool) -> None:
        """Its reader is done with it; unless the answer is complete, the coordinator is told."""
        link = self._homes.pop(request_id, None)
        if link is None:
            return
        if timer := link.timers.pop(request_id):
            timer.cancel()
        if complete or not link.connection.ready:  # a coordinator aborts what a lost connection leaves
            return
        try:
            link.connection.socket.send(encode(Abort(request_id)), zmq.NOBLOCK)
        except zmq.Again:
            logger.error("%s was not told of the end of request %s", link.listener.address, request_id)
        self._read(link)

    def close(self) -> None:
        """Close every connection; idempotent."""
        for link in self._links.values():
            self._close(link)
        self._links.clear()
        self._context.destroy(linger=0)

    def _connect(self, listener: Listener) -> None:
        connection = Connection(self._context, listener, self.public_key, self._secret_key, MAX_NOTICE_BYTES)
        link = self._links[listener.replica_id] = _CoordinatorConnection(listener, connection)
        for socket in (connection.socket, connection.monitor):
            self._loop.add_reader(socket.get(zmq.FD), self._read, link)
        self._read(link)

    def _close(self, link: _CoordinatorConnection) -> None:
        for socket in (link.connection.socket, link.connection.monitor):
            self._loop.remove_reader(socket.get(zmq.FD))
        for timer in link.timers.values():
            if timer is not None:
                timer.cancel()
        link.connection.close()

    def _read(self, link: _CoordinatorConnection) -> None:
        """Read all that is there: ZeroMQ's descriptors signal new data once, and any call may take that signal."""
        while link.connection.socket.poll(0):
            try:
                notice = decode_notice(link.connection.socket.recv())
            except (msgspec.MsgspecError, ValueError) as error:
                logger.error("dropped a message that does not fit the contract: %s", error)
                continue
            if notice is not None and notice.request_id in link.timers:
                self._note(link, notice)
        for reason in link.connection.breaks():
            logger.warning("coordinator %s: %s", link.listener.replica_id, reason)
            for request_id in link.timers:
                self._fail(
                    request_id, CoordinatorLostError("the coordinator is being replaced; send the request again")
                )

    def _note(self, link: _CoordinatorConnection, notice: Notice) -> None:
        if notice.failure is not None:
            self._fail(notice.request_id, from_failure(notice.failure))
        elif notice.finished:
            self._expect(link, notice.request_id, LATE_DELTAS_S, "the last tokens were lost; send the request again")
        else:
            self._expect(link, notice.request_id)

    def _expect(
        self, link: _CoordinatorConnection, request_id: str, seconds: float | None = None, otherwise: str = ""
    ) -> None:
        """Fail the request unless a notice of it comes in time; None: no longer wait for one."""
        if timer := link.timers.get(request_id):
            timer.cancel()

        def overdue() -> None:
            self._read(link)  # the event loop may have been busy
            if link.timers.get(request_id) is expected:
                self._fail(request_id, CoordinatorLostError(otherwise))

        expected = None if seconds is None else self._loop.call_later(seconds, overdue)
        link.timers[request_id] = expected
