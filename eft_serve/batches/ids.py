"""Ids of files and batches, ordered by time, and the directory of a tenant: both are safe parts of a path."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eft_serve.errors import InvalidRequestError

FILE, BATCH = "file-", "batch_"
MAX_SHOWN = 100  # characters of a caller's id in an error
_TIME_DIGITS, _RANDOM_BYTES = 12, 10
_REST = re.compile(rf"[0-9a-f]{{{_TIME_DIGITS + 2 * _RANDOM_BYTES}}}")


def new_id(prefix: str) -> str:
    """An id that sorts after older ones and cannot be guessed."""
    return f"{prefix}{time.time_ns() // 1_000_000:0{_TIME_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"


def is_id(prefix: str, text: str) -> bool:
    """Whether `new_id` could have made it; nothing else becomes part of a path."""
    return text.startswith(prefix) and _REST.fullmatch(text.removeprefix(prefix)) is not None


def seconds_of(prefix: str, each: str) -> float:
    """When an id was made, in Unix seconds."""
    return int(each.removeprefix(prefix)[:_TIME_DIGITS], 16) / 1000


def tenant_directory(tenant: str) -> str:
    """A name of its own for each tenant, also where file names ignore case or have few characters."""
    readable = re.sub(r"[^a-z0-9-]", "-", tenant.lower())[:40]
    return f"{readable}-{hashlib.sha256(tenant.encode()).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class Paging:
    """Which part of a list is wanted."""

    limit: int
    after: str | None = None  # the id before the first
    newest_first: bool = True


def chunks(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The ids in runs of `size`."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def remaining(ids: Sequence[str], paging: Paging) -> list[str]:
    """The ids after `paging.after`, in the order that is wanted.

    Args:
        ids: all that the tenant has, the oldest first.

    Raises:
        InvalidRequestError: `after` is none of them.
    """
    ordered = list(reversed(ids)) if paging.newest_first else list(ids)
    if paging.after is None:
        return ordered
    if paging.after not in ordered:
        shown = paging.after[:MAX_SHOWN]
        raise InvalidRequestError(f"after: {shown!r} is not in this list; begin again without it", param="after")
    return ordered[ordered.index(paging.after) + 1 :]
