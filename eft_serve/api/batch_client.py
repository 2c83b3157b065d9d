"""The requests of batches: this process's own, in a tenant's name, through the whole application.

So a batch gets what the tenant would get: the same validation, models, limits and counts. Besides, it leaves the tenant
half of its limits, and all tenants what `server.batch_concurrency` leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from eft_serve.api.auth import INSIDE, Access
from eft_serve.batches.service import BatchService
from eft_serve.batches.store import ObjectStore
from eft_serve.batches.watch import Timing
from eft_serve.config import ServerConfig
from eft_serve.tenancy.tenants import Tenant

BASE_URL = "http://localhost"


def open_storage(config: ServerConfig, access: Access, app: FastAPI, timing: Timing) -> BatchService | None:
    """Files and batches, where the configuration switches them on.

    Raises:
        ConfigError: they cannot be kept there.
    """
    if config.files_url is None:
        return None
    slots = BatchSlots(config.batch_concurrency)

    def client_of(name: str) -> httpx.AsyncClient:
        transport = TenantTransport(app, access.named(name), slots)
        return httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=None)  # noqa: S113, the API has one

    store = ObjectStore(config.files_url)
    return BatchService(store, config.max_stored_bytes, config.batch_concurrency, client_of, timing)


class TenantTransport(httpx.AsyncBaseTransport):
    """Sends requests to the application in this process, as a tenant."""

    def __init__(self, app: ASGIApp, tenant: Tenant, slots: BatchSlots) -> None:
        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, INSIDE: tenant}, receive, send)

        self._tenant = tenant
        self._slots = slots
        # An exception of the application is that request's 500; the middleware has logged it.
        self._transport = httpx.ASGITransport(inside, raise_app_exceptions=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The whole answer, once there is a slot."""
        async with self._slots.hold(self._tenant):
            return await self._transport.handle_async_request(request)


class BatchSlots:
    """What batches may run at once in this process.

    Args:
        num_slots: of all tenants together; they get them in turn.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._all = asyncio.Semaphore(num_slots)
        self._of_tenant: dict[str, asyncio.Semaphore] = {}
        self._next_start: dict[str, float] = {}  # seconds of the event loop's clock

    @asynccontextmanager
    async def hold(self, tenant: Tenant) -> AsyncIterator[None]:
        """One slot while the block lasts."""
        await self._pace(tenant)
        limit = tenant.max_concurrent_requests
        most = self._num_slots if limit is None else max(1, limit // 2)
        async with self._of_tenant.setdefault(tenant.name, asyncio.Semaphore(most)), self._all:
            yield

    async def _pace(self, tenant: Tenant) -> None:
        """Begin half as often as the tenant may, so that the other half is there at any time."""
        if tenant.requests_per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start.get(tenant.name, now))
        self._next_start[tenant.name] = start + 60 / max(1, tenant.requests_per_minute // 2)
        await asyncio.sleep(start - now)
