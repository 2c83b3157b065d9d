"""The batches of all tenants in a store. Every method blocks; what each guarantees, several processes may rely on.

A batch's directory has `spec.json`, `lease-N.json`, `cancel.json`, `end.json` and its answers. An object in `open/`
names each batch that has not ended, so that nobody looks for work among those that have.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec

from eft_serve.batches.answers import AnswerLog
from eft_serve.batches.ids import BATCH, MAX_SHOWN, Paging, chunks, is_id, remaining, seconds_of, tenant_directory
from eft_serve.batches.records import End, Facts, Lease, Spec
from eft_serve.batches.store import ObjectStore
from eft_serve.errors import QuotaError, ResourceNotFoundError

MAX_OPEN = 100  # batches of a tenant that have not ended
UNDESCRIBED_S = 600.0  # an open batch without a spec after this: its creation was cut off
SEPARATOR = "~"  # in neither part of a name in `open/`

Address = tuple[str, str]  # the tenant's directory, the batch's id


class Ledger:
    """Batches in a store; see the module's docstring."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, spec: Spec) -> None:
        """Add a batch; raises `QuotaError` when the tenant has `MAX_OPEN` already."""
        address = address_of(spec)
        if len(self._open_of(address[0])) >= MAX_OPEN:
            raise QuotaError(f"you have {MAX_OPEN} batches that have not ended; wait for one, or cancel one")
        self._store.create(_open_key(address), b"")
        self._store.create(_key(address, "spec.json"), msgspec.json.encode(spec))

    def find(self, address: Address) -> Facts | None:
        """All of a batch, or None when there is none."""
        names = self._store.names(_key(address, ""))
        spec = self._store.find(_key(address, "spec.json")) if "spec.json" in names else None
        if spec is None:
            return None
        epochs = [int(name[len("lease-") : -len(".json")]) for name in names if name.startswith("lease-")]
        epoch = max(epochs, default=0)
        cancel = self._store.get(_key(address, "cancel.json")) if "cancel.json" in names else None
        end = self._store.get(_key(address, "end.json")) if "end.json" in names else None
        return Facts(
            spec=msgspec.json.decode(spec, type=Spec),
            epoch=epoch,
            lease=self.lease(address, epoch) if epoch else None,
            cancelling_at=msgspec.json.decode(cancel, type=int) if cancel else None,
            end=msgspec.json.decode(end, type=End) if end else None,
        )

    def find_all(self, addresses: Sequence[Address]) -> list[Facts | None]:
        """`find` of each."""
        return self._store.map(self.find, addresses)

    def get(self, tenant: str, batch_id: str) -> Facts:
        """Raises `ResourceNotFoundError` when the tenant has no such batch."""
        found = self.find((tenant_directory(tenant), batch_id)) if is_id(BATCH, batch_id) else None
        if found is None:
            shown = batch_id[:MAX_SHOWN]
            message = f"batch_id: no such batch: {shown!r}; GET /v1/batches lists yours"
            raise ResourceNotFoundError(message, param="batch_id")
        return found

    def page(self, tenant: str, paging: Paging) -> tuple[list[Facts], bool]:
        """Batches, and whether there are more; raises `InvalidRequestError`, see `remaining`."""
        directory = tenant_directory(tenant)
        found: list[Facts] = []
        for some in chunks(remaining(self._store.names(f"tenants/{directory}/batches"), paging), paging.limit + 1):
            found += filter(None, self.find_all([(directory, batch_id) for batch_id in some]))
            if len(found) > paging.limit:
                return found[: paging.limit], True
        return found, False

    def cancel(self, address: Address, now: int) -> None:
        """Ask whoever runs it to stop; the first time counts."""
        self._store.create(_key(address, "cancel.json"), msgspec.json.encode(now))

    def take(self, address: Address, epoch: int, lease: Lease) -> bool:
        """Whether this process got lease number `epoch`; the holder of the one before has lost the batch."""
        return self._store.create(_lease_key(address, epoch), msgspec.json.encode(lease))

    def beat(self, address: Address, epoch: int, lease: Lease) -> None:
        """Renew the lease, with what is new."""
        self._store.put(_lease_key(address, epoch), msgspec.json.encode(lease))

    def lease(self, address: Address, epoch: int) -> Lease:
        """One of a batch's leases."""
        return msgspec.json.decode(self._store.get(_lease_key(address, epoch)), type=Lease)

    def end(self, address: Address, end: End) -> bool:
        """Whether this end is the batch's; False when it has ended otherwise."""
        return self._store.create(_key(address, "end.json"), msgspec.json.encode(end))

    def close(self, address: Address) -> None:
        """Drop what an ended batch no longer needs."""
        self.answers(address).drop()
        self._store.delete(_open_key(address))

    def answers(self, address: Address) -> AnswerLog:
        """The answers so far."""
        return AnswerLog(self._store, _key(address, "answers"))

    def open_batches(self) -> Iterator[Address]:
        """Those of all tenants that have not ended, the oldest first."""
        pairs = [tuple(name.split(SEPARATOR)) for name in self._store.names("open")]
        yield from sorted(((pair[0], pair[1]) for pair in pairs if len(pair) == 2), key=lambda pair: pair[1])

    def reads(self, tenant: str, file_id: str) -> str | None:
        """The id of an open batch that reads this file."""
        directory = tenant_directory(tenant)
        for batch_id in self._open_of(directory):
            facts = self.find((directory, batch_id))
            if facts is not None and facts.end is None and facts.spec.input_file_id == file_id:
                return batch_id
        return None

    def forget_undescribed(self, address: Address) -> None:
        """Drop the name of a batch whose creation was cut off, once it is certain."""
        if time.time() - seconds_of(BATCH, address[1]) > UNDESCRIBED_S:
            self._store.delete(_open_key(address))

    def _open_of(self, directory: str) -> list[str]:
        return [batch_id for owner, batch_id in self.open_batches() if owner == directory]


def address_of(spec: Spec) -> Address:
    """Where a batch is."""
    return tenant_directory(spec.tenant), spec.id


def _key(address: Address, name: str) -> str:
    return f"tenants/{address[0]}/batches/{address[1]}/{name}".rstrip("/")


def _lease_key(address: Address, epoch: int) -> str:
    return _key(address, f"lease-{epoch:06}.json")


def _open_key(address: Address) -> str:
    return f"open/{SEPARATOR.join(address)}"
