"""Memory that a client shares with the servers of its host, so that logits need no socket: a sealed anonymous file.

Nothing has a name in any file system: the file lives as long as a process holds it. A server finds it through /proc,
where only the same user may look, and trusts it only if it carries the nonce that the client sent with the
encrypted message: in another pid namespace, or on another host, the same numbers name something else.

**Who may write when.** Before a client sends a message it writes that message's id into the segment; from then on what
it read there is no longer valid. A server writes rows only while the id is that of the message that it answers, and has
one thread for it. So rows of a message that the client gave up never land once a later one was answered, in whatever
order the two arrive; and a client that takes rows only with the answer to its last message reads what belongs to it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import stat
import time
from dataclasses import dataclass
from typing import Self

import msgspec

logger = logging.getLogger(__name__)

SUPPORTED = hasattr(os, "memfd_create")
MAX_BYTES = 1 << 30
IDLE_S = 60.0
_NONCE_BYTES = 16
_MESSAGE_ID = slice(_NONCE_BYTES, _NONCE_BYTES + 8)
_DATA_START = mmap.PAGESIZE
_LEAST_BYTES = 1 << 20


class SegmentName(msgspec.Struct, frozen=True, array_like=True):
    """Where a process on the same host finds a segment."""

    pid: int
    fd: int
    nonce: bytes


class Segment:
    """A mapped segment, in the process that made it and in those that opened it."""

    def __init__(self, name: SegmentName, memory: mmap.mmap) -> None:
        self.name = name
        self._memory = memory
        self.data = memoryview(memory)[_DATA_START:]

    @classmethod
    def create(cls, num_bytes: int) -> Self:
        """Room for so many bytes and some more; raises OSError where the system refuses."""
        size = _DATA_START + max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        fd = os.memfd_create("eft-serve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        nonce = secrets.token_bytes(_NONCE_BYTES)
        memory[:_NONCE_BYTES] = nonce
        return cls(SegmentName(os.getpid(), fd, nonce), memory)

    @classmethod
    def open(cls, name: SegmentName) -> Self:
        """Another process's segment; raises OSError if it is another file or cannot be reached."""
        path = f"/proc/{name.pid}/fd/{name.fd}"
        _check_owner(os.stat(path))  # before opening: opening another kind of file could have side effects
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            _check_owner(status)
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise PermissionError(errno.EPERM, "not sealed: it could shrink under our hands", path)
            if not _DATA_START < status.st_size <= _DATA_START + MAX_BYTES:
                raise OSError(errno.EINVAL, f"{status.st_size} bytes", path)
            memory = mmap.mmap(fd, status.st_size)
        finally:
            os.close(fd)
        if not secrets.compare_digest(memory[:_NONCE_BYTES], name.nonce):
            raise PermissionError(errno.EPERM, "another nonce: it belongs to another client", path)
        return cls(name, memory)

    @property
    def message_id(self) -> int:
        """The message whose rows may be written now."""
        return int.from_bytes(self._memory[_MESSAGE_ID], "little")

    @message_id.setter
    def message_id(self, message_id: int) -> None:
        self._memory[_MESSAGE_ID] = message_id.to_bytes(8, "little")

    def close(self) -> None:
        """Called by its maker: it can no longer be opened. The memory is released with the last view of it."""
        os.close(self.name.fd)


_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if SUPPORTED else 0


def _check_owner(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
        raise PermissionError(errno.EPERM, "not a file of this user")


@dataclass(slots=True)
class _Known:
    name: SegmentName
    segment: Segment | None  # None: it could not be opened
    last_named: float  # monotonic seconds


class OpenSegments:
    """What a server has mapped, one segment for each client; what cannot be opened is tried only once."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}

    def __len__(self) -> int:
        return sum(known.segment is not None for known in self._known.values())

    def find(self, client: bytes, name: SegmentName | None) -> Segment | None:
        """The segment that this client names, opened if need be; None when there is none that can be reached."""
        if name is None:
            return None
        known = self._known.get(client)
        if known is None or known.name != name:
            known = self._known[client] = _Known(name, _open(name), 0.0)
        known.last_named = time.monotonic()
        return known.segment

    def forget_idle(self) -> None:
        """Release the segments that were not named for `IDLE_S`: their clients may be gone."""
        oldest = time.monotonic() - IDLE_S
        self._known = {client: known for client, known in self._known.items() if known.last_named >= oldest}


def _open(name: SegmentName) -> Segment | None:
    try:
        return Segment.open(name)
    except (OSError, ValueError) as error:  # ValueError: an empty file, or numbers that no path can hold
        logger.debug("replies go by the socket, the client's segment is out of reach: %s", error)
        return None
