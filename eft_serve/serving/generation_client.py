"""An ingress's client of the coordinators: sends a request to one of them, and yields its deltas.

It knows where coordinators listen. It does not know how they are found.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from eft_serve.errors import CoordinatorLostError, EftServeError, InvalidRequestError
from eft_serve.serving.migration import Migration
from eft_serve.serving.output_collector import OutputCollector
from eft_serve.transport.coordinator_client import CoordinatorClient
from eft_serve.transport.deltas import DeltaReceiver, Part, ReplyTo
from eft_serve.types import Delta, GenerationRequest, Listener

FIND_TIMEOUT_S = 5.0  # a coordinator may just be starting
RECOVERY_TIMEOUT_S = 60.0  # one that was lost is being replaced

logger = logging.getLogger(__name__)


class GenerationClient:
    """Created and used on one event loop.

    Args:
        host: the interface to receive deltas on.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._event_loop = asyncio.get_running_loop()
        self._collectors: dict[str, OutputCollector] = {}  # by request id
        self._coordinators = CoordinatorClient(self._fail)
        self._receiver = DeltaReceiver(self._receive, host=host)

    @property
    def public_key(self) -> bytes:
        """CURVE, Z85: what a coordinator must allow."""
        return self._coordinators.public_key

    @property
    def reply_to(self) -> ReplyTo:
        """Where a coordinator sends deltas."""
        return self._receiver.reply_to

    @property
    def ready(self) -> bool:
        """Whether a coordinator is connected."""
        return self._coordinators.ready

    def set_coordinators(self, coordinators: Mapping[str, Listener]) -> None:
        """All current coordinators, by replica id."""
        self._coordinators.set_coordinators(coordinators)

    def check(self) -> None:
        """Raises RuntimeError when deltas no longer arrive."""
        self._receiver.check()

    def close(self) -> None:
        """Close all sockets."""
        self._coordinators.close()
        self._receiver.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Run a request; closing the generator, or cancelling the task that waits in it, aborts the request.

        A coordinator that goes away costs a pause: another one, or its successor, goes on with the very tokens.

        Raises:
            UnavailableError: no coordinator accepts it in time, or several went away before they gave a token.
            InvalidRequestError: its id is open already.
        """
        migration = Migration(request)
        while True:
            try:
                async with aclosing(self._run(migration)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except CoordinatorLostError as error:
                migration.lose(error)
                logger.warning("request %s goes on elsewhere: %s", request.request_id, error.message)

    async def _run(self, migration: Migration) -> AsyncGenerator[Delta, None]:
        """On one coordinator, until it ends or the coordinator is lost."""
        await self._find_coordinator(RECOVERY_TIMEOUT_S if migration.num_lost else FIND_TIMEOUT_S)
        request = migration.current()
        if request.request_id in self._collectors:
            raise InvalidRequestError(f"request_id: {request.request_id!r} is open already", param="request_id")
        collector = self._collectors[request.request_id] = OutputCollector(migration.num_tokens)
        try:
            self._coordinators.submit(request, self.reply_to.address)
            async for delta in collector.read():
                migration.take(delta)
                yield delta
        finally:
            del self._collectors[request.request_id]
            self._coordinators.end(request.request_id, complete=collector.complete)

    async def _find_coordinator(self, timeout_s: float) -> None:
        """Return when a coordinator is connected, or after a timeout; then the request is refused."""
        deadline = time.monotonic() + timeout_s
        while not self.ready and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _fail(self, request_id: str, error: EftServeError) -> None:
        if collector := self._collectors.get(request_id):  # none: its reader is gone
            collector.fail(error)

    def _receive(self, parts: Sequence[Part]) -> None:
        """Called in the receiver's thread: one call to the event loop for all deltas of a step."""
        self._event_loop.call_soon_threadsafe(self._deliver, parts)

    def _deliver(self, parts: Sequence[Part]) -> None:
        for request_id, num_before, delta in parts:
            if collector := self._collectors.get(request_id):  # none: its reader is gone
                collector.put(num_before, delta)
