"""Objects under one URL, by fsspec: a directory, or a bucket that the servers share. Every method blocks.

Knows no tenants. What it asks of a filesystem is little: a whole object is replaced at once, and of several processes
that create one object exactly one succeeds.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from eft_serve.errors import ConfigError

PIECE_BYTES = 2**20
NUM_READERS = 32
PROBE = "probe-"
SETTING = "server.files_url"

T = TypeVar("T")
R = TypeVar("R")

_memory_lock = threading.Lock()  # fsspec's memory filesystem is not made for several threads


class ObjectStore:
    """Objects by key; a key is a relative path that callers make of safe parts.

    Args:
        url: a directory's absolute path, or a URL that fsspec knows.

    Raises:
        ConfigError: it cannot be opened or written, or it cannot create an object exclusively.
    """

    def __init__(self, url: str) -> None:
        try:
            # A cached listing would hide what the other servers did.
            self._fs, self._root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError, TypeError) as error:
            raise _unusable(error) from error
        self._local = isinstance(self._fs, LocalFileSystem)
        self._is_near = self._local or isinstance(self._fs, MemoryFileSystem)
        self._guard = _memory_lock if isinstance(self._fs, MemoryFileSystem) else nullcontext()
        if not self._local and _only_looks_before_it_writes(self._fs):
            kind = type(self._fs).__name__
            raise ConfigError(f"{SETTING}: {kind} cannot create a file exclusively; use a directory or an object store")
        try:
            if self._local:
                Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._probe()
        except Exception as error:  # each filesystem has errors of its own
            raise _unusable(error) from error

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object at once; False when there is one already, which is not touched."""
        path = self._path(key)
        try:
            if self._local:
                _write_local(path, data, os.link)
            else:
                with self._guard:
                    self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Write an object at once, or replace it."""
        path = self._path(key)
        if self._local:
            _write_local(path, data, os.replace)
        else:
            self._fs.pipe_file(path, data)

    def get(self, key: str) -> bytes:
        """A small object; raises `FileNotFoundError`."""
        data: bytes = self._fs.cat_file(self._path(key))
        return data

    def find(self, key: str) -> bytes | None:
        """A small object, or None when there is none."""
        try:
            return self.get(key)
        except FileNotFoundError:
            return None

    def map(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """What a call that reads gives for each item; at once where every read is a round trip."""
        if self._is_near:
            return list(map(call, items))
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return list(readers.map(call, items))

    def write(self, key: str, pieces: Iterable[bytes]) -> int:
        """Write a large object piece by piece; gives its bytes. Until it returns, the object may be there in part."""
        path, size = self._path(key), 0
        if self._local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self._fs.open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
                size += len(piece)
        return size

    def read(self, key: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of a large object, in pieces; raises `FileNotFoundError`."""
        path = self._path(key)
        for start in range(0, size, PIECE_BYTES):
            yield self._fs.cat_file(path, start=start, end=min(start + PIECE_BYTES, size))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Name → bytes of what is directly below a prefix, in the order of names."""
        path = self._path(prefix)
        try:
            with self._guard:
                entries = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        named = {str(entry["name"]).rstrip("/").rpartition("/")[2]: int(entry["size"] or 0) for entry in entries}
        hidden = {"", path.rpartition("/")[2]}  # a bucket's marker of the prefix itself
        return {name: named[name] for name in sorted(named) if name not in hidden and not name.startswith(".")}

    def names(self, prefix: str) -> list[str]:
        """What is directly below a prefix, in order."""
        return list(self.sizes(prefix))

    def delete(self, key: str) -> None:
        """Delete an object, if there is one."""
        with suppress(FileNotFoundError), self._guard:
            self._fs.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}"

    def _probe(self) -> None:
        key = PROBE + uuid.uuid4().hex
        created = [self.create(key, b"probe"), self.create(key, b"again")]
        self.delete(key)
        if created != [True, False]:
            raise ValueError("it lets two processes create one file")


def _write_local(path: str, data: bytes, place: Callable[[Path, Path], None]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _only_looks_before_it_writes(fs: AbstractFileSystem) -> bool:
    """Whether `pipe_file(mode="create")` is fsspec's fallback, which two processes can pass together."""
    return not fs.async_impl and type(fs).pipe_file is AbstractFileSystem.pipe_file


def _unusable(error: Exception) -> ConfigError:
    # The URL is not repeated: it may hold a password.
    return ConfigError(f"{SETTING}: cannot be used: {type(error).__name__}: {error}", param=SETTING)
