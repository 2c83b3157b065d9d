"""The files of tenants. Every method blocks; one tenant's files do not exist for another."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import msgspec

from eft_serve.batches.ids import (
    FILE,
    MAX_SHOWN,
    Paging,
    chunks,
    is_id,
    new_id,
    remaining,
    seconds_of,
    tenant_directory,
)
from eft_serve.batches.store import ObjectStore
from eft_serve.errors import QuotaError, ResourceNotFoundError

MAX_FILES = 10_000  # of a tenant: one page of OpenAI's list
MAX_AT_ONCE = 500  # descriptions in memory beyond those that are asked for
ABANDONED_S = 24 * 3600.0  # contents without a description after this: their upload was cut off
INPUT, OUTPUT = "batch", "batch_output"  # purposes
DESCRIPTION, CONTENT = ".json", ".data"


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file; fields as in OpenAI's object."""

    id: str
    bytes: int
    created_at: int  # Unix seconds
    filename: str
    purpose: str

    def as_json(self) -> dict[str, object]:
        """OpenAI's object."""
        constant = {"object": "file", "status": "processed", "status_details": None, "expires_at": None}
        return {**msgspec.to_builtins(self), **constant}


class Files:
    """Files in a store. A file exists when its description does, which is written last and deleted first.

    Args:
        store: where they are kept.
        max_stored_bytes: of one tenant's files together; outputs of batches count and are never refused.
    """

    def __init__(self, store: ObjectStore, max_stored_bytes: int) -> None:
        self._store = store
        self._max_stored_bytes = max_stored_bytes

    def check_room(self, tenant: str, num_bytes: int) -> None:
        """Raises `QuotaError` when the tenant has no room for another file of so many bytes."""
        sizes = self._store.sizes(_directory(tenant))
        self._drop_abandoned(tenant, sizes)
        contents = [size for name, size in sizes.items() if name.endswith(CONTENT)]
        if len(contents) >= MAX_FILES:
            raise QuotaError(f"file: you have {len(contents)} files already; delete some", param="file")
        if sum(contents) + num_bytes > self._max_stored_bytes:
            raise QuotaError(
                f"file: your files would exceed {self._max_stored_bytes} bytes together (server.max_stored_bytes); "
                "delete some",
                param="file",
            )

    def add(
        self, tenant: str, purpose: str, filename: str, pieces: Iterable[bytes], file_id: str | None = None
    ) -> StoredFile:
        """Keep a file.

        Args:
            file_id: from `new_id(FILE)`; made here when not given.
        """
        file_id = file_id or new_id(FILE)
        size = self._store.write(_key(tenant, file_id, CONTENT), pieces)
        stored = StoredFile(id=file_id, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose)
        self._store.put(_key(tenant, file_id, DESCRIPTION), msgspec.json.encode(stored))
        return stored

    def get(self, tenant: str, file_id: str, param: str = "file_id") -> StoredFile:
        """Raises `ResourceNotFoundError` when the tenant has no such file."""
        found = self._store.find(_key(tenant, file_id, DESCRIPTION)) if is_id(FILE, file_id) else None
        if found is None:
            raise _not_found(file_id, param)
        return msgspec.json.decode(found, type=StoredFile)

    def page(self, tenant: str, paging: Paging, purpose: str | None) -> tuple[list[StoredFile], bool]:
        """Files, and whether there are more; raises `InvalidRequestError`, see `remaining`."""
        names = self._store.names(_directory(tenant))
        ids = [name.removesuffix(DESCRIPTION) for name in names if name.endswith(DESCRIPTION)]
        found: list[StoredFile] = []
        for some in chunks(remaining(ids, paging), min(paging.limit + 1, MAX_AT_ONCE)):
            keys = [_key(tenant, file_id, DESCRIPTION) for file_id in some]
            descriptions = filter(None, self._store.map(self._store.find, keys))  # none: just deleted
            files = (msgspec.json.decode(each, type=StoredFile) for each in descriptions)
            found += [file for file in files if purpose in (None, file.purpose)]
            if len(found) > paging.limit:
                return found[: paging.limit], True
        return found, False

    def read(self, tenant: str, stored: StoredFile) -> Iterator[bytes]:
        """The contents in pieces; raises `FileNotFoundError` when it is deleted meanwhile."""
        return self._store.read(_key(tenant, stored.id, CONTENT), stored.bytes)

    def delete(self, tenant: str, file_id: str) -> None:
        """Raises `ResourceNotFoundError` when the tenant has no such file."""
        self.discard(tenant, self.get(tenant, file_id).id)

    def discard(self, tenant: str, file_id: str) -> None:
        """Delete what there may be of a file."""
        for kind in (DESCRIPTION, CONTENT):
            self._store.delete(_key(tenant, file_id, kind))

    def _drop_abandoned(self, tenant: str, sizes: dict[str, int]) -> None:
        for name in [name for name in sizes if name.endswith(CONTENT)]:
            file_id = name.removesuffix(CONTENT)
            if file_id + DESCRIPTION not in sizes and time.time() - seconds_of(FILE, file_id) > ABANDONED_S:
                self._store.delete(_key(tenant, file_id, CONTENT))
                del sizes[name]


def _directory(tenant: str) -> str:
    return f"tenants/{tenant_directory(tenant)}/files"


def _key(tenant: str, file_id: str, kind: str) -> str:
    return f"{_directory(tenant)}/{file_id}{kind}"


def _not_found(file_id: str, param: str) -> ResourceNotFoundError:
    message = f"{param}: no such file: {file_id[:MAX_SHOWN]!r}; GET /v1/files lists yours"
    return ResourceNotFoundError(message, param=param)
