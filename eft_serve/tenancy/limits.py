"""How much a tenant may ask for: requests per minute and choices at once, counted in this process's memory.

With several server processes, each admits that much: a limit is per process, and a restart forgets the minute.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from eft_serve.errors import InvalidRequestError, RateLimitError
from eft_serve.tenancy.tenants import Tenant

CONCURRENCY_RETRY_S = 1.0  # it is unknown when a running request ends


class AdmissionLimits:
    """Admits requests of tenants, each within its own limits; used by one event loop."""

    def __init__(self) -> None:
        self._window = MovingWindowRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    def num_running(self, tenant: str) -> int:
        """Choices that are being generated for this tenant."""
        return self._running[tenant]

    @asynccontextmanager
    async def admit(self, tenant: Tenant, num_choices: int = 1, param: str = "n") -> AsyncIterator[None]:
        """Hold the tenant's quota while the body runs; given back however it ends.

        Args:
            tenant: who asks.
            num_choices: how many run at once.
            param: the field that sets `num_choices`.

        Raises:
            RateLimitError: a limit is reached; the message names which, `retry_after_s` says when to try again.
            InvalidRequestError: the request has more choices than the tenant may ever run at once.
        """
        self._check_concurrency(tenant, num_choices, param)
        self._check_rate(tenant)
        self._running[tenant.name] += num_choices
        try:
            yield
        finally:
            self._running[tenant.name] -= num_choices

    def _check_concurrency(self, tenant: Tenant, num_choices: int, param: str) -> None:
        limit = tenant.max_concurrent_requests
        if limit is None or self._running[tenant.name] + num_choices <= limit:
            return
        if num_choices > limit:
            raise InvalidRequestError(
                f"{param}: {num_choices} are more than the {limit} that you may run at once", param=param
            )
        raise RateLimitError(
            f"max_concurrent_requests: {limit} are running already; wait for one to end",
            retry_after_s=CONCURRENCY_RETRY_S,
        )

    def _check_rate(self, tenant: Tenant) -> None:
        if tenant.requests_per_minute is None:
            return
        item = RateLimitItemPerMinute(tenant.requests_per_minute)
        if self._window.hit(item, tenant.name):
            return
        reset = self._window.get_window_stats(item, tenant.name).reset_time
        raise RateLimitError(
            f"requests_per_minute: {tenant.requests_per_minute} were made in the last minute",
            retry_after_s=max(0.0, reset - time.time()),
        )
