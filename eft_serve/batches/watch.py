"""Finds batches that nobody runs, and runs them: new ones, and those of a process that died or stopped.

A process is taken for dead when its lease has not changed for `Timing.lease_s` on the watcher's own clock, so that the
clocks of machines need not agree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from eft_serve.batches.ledger import Address, address_of
from eft_serve.batches.records import End, Facts, Lease, Mistake
from eft_serve.batches.run import BatchRun, Shared

MAX_RUNNING = 16  # batches at once in a process
MAX_OF_TENANT = 1  # of them; a tenant's batches take turns
MAX_LEASES = 200  # of one batch: what breaks off that often will not end by itself

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """How often processes look at the store, in seconds."""

    look_s: float = 5.0
    beat_s: float = 5.0
    lease_s: float = 30.0


TIMING = Timing()


@dataclass(frozen=True, slots=True)
class Sighting:
    """A lease as it was first seen."""

    epoch: int
    beat: int
    since: float  # seconds of the monotonic clock


class Watch:
    """The batches that this process runs.

    Args:
        shared: for each of them.
    """

    def __init__(self, shared: Shared, timing: Timing) -> None:
        self._shared = shared
        self._timing = timing
        self._running: dict[Address, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._sightings: dict[Address, Sighting] = {}
        self._look_now = asyncio.Event()

    def poke(self, address: Address) -> None:
        """Something is new about this batch: look at it now."""
        if address in self._running:
            self._running[address][0].poke.set()
        self._look_now.set()

    async def run(self) -> None:
        """Until it is cancelled; then every batch is let go, so that another process can go on at once."""
        try:
            while True:
                try:
                    await self._look()
                except Exception:  # of the store, each has its own; the next look may succeed
                    logger.exception("the batches could not be looked at")
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._timing.look_s):
                        await self._look_now.wait()
                self._look_now.clear()
        finally:
            tasks = [task for _, task in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        run = self._shared.offload.run
        addresses = await run(lambda: list(self._shared.ledger.open_batches()))
        self._sightings = {each: seen for each, seen in self._sightings.items() if each in set(addresses)}
        of_tenant = Counter(directory for directory, _ in self._running)
        idle = [each for each in addresses if each not in self._running]
        for address, facts in zip(idle, await run(self._shared.ledger.find_all, idle), strict=True):
            if facts is None:
                await run(self._shared.ledger.forget_undescribed, address)
            elif facts.end is not None:
                await run(self._shared.ledger.close, address)  # whoever ended it did not come so far
            elif not self._is_free(address, facts):
                continue
            elif facts.epoch >= MAX_LEASES:
                await run(self._give_up, facts)
            elif _is_over(facts) or self._has_room(of_tenant[address[0]]):
                of_tenant[address[0]] += await self._take(facts)

    def _has_room(self, num_of_tenant: int) -> bool:
        return num_of_tenant < MAX_OF_TENANT and len(self._running) < MAX_RUNNING

    def _is_free(self, address: Address, facts: Facts) -> bool:
        """Whether nobody runs it."""
        if facts.lease is None or facts.lease.released:
            return True
        seen, now = self._sightings.get(address), time.monotonic()
        if seen is None or (seen.epoch, seen.beat) != (facts.epoch, facts.lease.beat):
            self._sightings[address] = Sighting(facts.epoch, facts.lease.beat, now)
            return False
        return now - seen.since > self._timing.lease_s

    async def _take(self, facts: Facts) -> bool:
        """Run a batch, unless another process is quicker."""
        epoch, before = facts.epoch + 1, facts.lease or Lease()
        lease = msgspec.structs.replace(before, beat=0, released=False, finalizing_at=None)
        lease.output_file_id = lease.error_file_id = None
        address = address_of(facts.spec)
        if not await self._shared.offload.run(self._shared.ledger.take, address, epoch, lease):
            return False
        batch = BatchRun(self._shared, facts, epoch, lease)
        self._running[address] = batch, asyncio.create_task(self._carry(address, batch))
        return True

    def _give_up(self, facts: Facts) -> None:
        logger.error("batch %s broke off %d times and is given up", facts.spec.id, facts.epoch)
        message = f"the server began this batch {facts.epoch} times and could not end it; its log says why"
        mistakes = [Mistake(code="internal_error", message=message)]
        lease, address = facts.lease or Lease(), address_of(facts.spec)
        lease.output_file_id = lease.error_file_id = None
        self._shared.ledger.end(address, End(outcome="failed", at=int(time.time()), lease=lease, mistakes=mistakes))
        self._shared.ledger.close(address)

    async def _carry(self, address: Address, batch: BatchRun) -> None:
        try:
            await batch.run()
        except Exception:  # the lease was let go, and the next look takes it again, until the batch expires
            logger.exception("batch %s broke off", batch.spec.id)
            await asyncio.sleep(self._timing.look_s)
        finally:
            del self._running[address]
            self._look_now.set()


def _is_over(facts: Facts) -> bool:
    """Whether only its end is left to be written."""
    return facts.cancelling_at is not None or facts.spec.expires_at <= time.time()
