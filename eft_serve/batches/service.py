"""What the API asks of files and batches: the other modules' calls, in threads, and the watch in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from eft_serve.batches.files import INPUT, Files, StoredFile
from eft_serve.batches.ids import BATCH, Paging, new_id
from eft_serve.batches.ledger import Ledger, address_of
from eft_serve.batches.offload import Offload
from eft_serve.batches.records import Facts, Spec
from eft_serve.batches.run import ClientOf, Shared
from eft_serve.batches.store import ObjectStore
from eft_serve.batches.watch import Timing, Watch
from eft_serve.errors import InvalidRequestError, UnavailableError

CALL_S = 60.0  # for the store to answer
UPLOAD_S = 600.0  # for it to take a file that has arrived

P = ParamSpec("P")
T = TypeVar("T")


class BatchService:
    """Files and batches of one process.

    Args:
        store: where everything is kept.
        max_stored_bytes: of a tenant's files.
        concurrency: requests of one batch at once.
        client_of: see `Shared`.
        timing: how often the store is looked at.
    """

    def __init__(
        self,
        store: ObjectStore,
        max_stored_bytes: int,
        concurrency: int,
        client_of: ClientOf,
        timing: Timing,
    ) -> None:
        self._offload = Offload()
        self._files = Files(store, max_stored_bytes)
        self._ledger = Ledger(store)
        shared = Shared(self._ledger, self._files, self._offload, client_of, concurrency, timing.beat_s)
        self._watch = Watch(shared, timing)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches while the block lasts."""
        watch = asyncio.create_task(self._watch.run())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._offload.close()

    async def add_file(self, tenant: str, filename: str, size: int, pieces: Iterable[bytes]) -> StoredFile:
        """Keep an upload; raises `QuotaError`, see `Files.check_room`."""
        await self._run(self._files.check_room, tenant, size)
        return await self._within(UPLOAD_S, self._files.add, tenant, INPUT, filename, pieces)

    async def file(self, tenant: str, file_id: str) -> StoredFile:
        """Raises `ResourceNotFoundError`, see `Files.get`."""
        return await self._run(self._files.get, tenant, file_id)

    async def files(self, tenant: str, paging: Paging, purpose: str | None) -> tuple[list[StoredFile], bool]:
        """See `Files.page`."""
        return await self._run(self._files.page, tenant, paging, purpose)

    def content(self, tenant: str, stored: StoredFile) -> AsyncGenerator[bytes, None]:
        """A file's contents in pieces."""
        return self._offload.each(self._files.read(tenant, stored))

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Delete a file.

        Raises:
            ResourceNotFoundError: the tenant has no such file.
            InvalidRequestError: a batch reads it.
        """
        await self._run(self._files.get, tenant, file_id)
        if (batch_id := await self._run(self._ledger.reads, tenant, file_id)) is not None:
            raise InvalidRequestError(
                f"file_id: {batch_id} reads this file; delete it when that has ended, or cancel that", param="file_id"
            )
        await self._run(self._files.delete, tenant, file_id)

    async def create(self, tenant: str, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> Facts:
        """Add a batch.

        Raises:
            ResourceNotFoundError: the tenant has no such file.
            InvalidRequestError: the file is no batch's input.
            QuotaError: the tenant has too many open batches.
        """
        stored = await self._run(self._files.get, tenant, input_file_id, "input_file_id")
        if stored.purpose != INPUT:
            message = f"input_file_id: the file's purpose is {stored.purpose!r}; upload one with purpose {INPUT!r}"
            raise InvalidRequestError(message, param="input_file_id")
        spec = Spec(
            id=new_id(BATCH),
            tenant=tenant,
            input_file_id=input_file_id,
            endpoint=endpoint,
            metadata=metadata,
            created_at=int(time.time()),
        )
        await self._run(self._ledger.create, spec)
        self._watch.poke(address_of(spec))
        return Facts(spec=spec)

    async def batch(self, tenant: str, batch_id: str) -> Facts:
        """Raises `ResourceNotFoundError`, see `Ledger.get`."""
        return await self._run(self._ledger.get, tenant, batch_id)

    async def batches(self, tenant: str, paging: Paging) -> tuple[list[Facts], bool]:
        """See `Ledger.page`."""
        return await self._run(self._ledger.page, tenant, paging)

    async def cancel(self, tenant: str, batch_id: str) -> Facts:
        """Stop a batch; whoever runs it ends it at its next beat.

        Raises:
            ResourceNotFoundError: the tenant has no such batch.
            InvalidRequestError: it has ended.
        """
        facts = await self.batch(tenant, batch_id)
        if facts.end is not None:
            raise InvalidRequestError(f"batch_id: this batch is {facts.status} already", param="batch_id")
        address = address_of(facts.spec)
        await self._run(self._ledger.cancel, address, int(time.time()))
        self._watch.poke(address)
        return await self.batch(tenant, batch_id)

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._within(CALL_S, call, *args, **kwargs)

    async def _within(self, timeout_s: float, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        timeout = asyncio.timeout(timeout_s)
        try:
            async with timeout:
                return await self._offload.run(call, *args, **kwargs)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise UnavailableError(f"the file store did not answer within {timeout_s:g} s; try again later") from error
