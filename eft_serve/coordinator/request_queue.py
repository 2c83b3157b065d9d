"""Requests that wait to be decoded, in the order in which they are to be admitted; knows requests and no replicas."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Protocol

from eft_serve.coordinator.request import Request


class RequestQueue(Protocol):
    """Who waits, and who is next."""

    def add(self, request: Request) -> None:
        """One more; also one that was preempted and waits again."""
        ...

    def peek(self) -> Request:
        """The next to be admitted; raises IndexError when nobody waits."""
        ...

    def pop(self) -> Request:
        """Take the next one out; raises IndexError when nobody waits."""
        ...

    def remove(self, request: Request) -> None:
        """Take this one out; raises ValueError when it does not wait."""
        ...

    def __iter__(self) -> Iterator[Request]:
        """All of them, the next one first; the queue may be changed meanwhile."""
        ...

    def __len__(self) -> int: ...


class FirstComeFirstServed:
    """By arrival. A preempted request came before most, and so waits before them."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=lambda each: each.arrival)

    def peek(self) -> Request:
        return self._requests[0]

    def pop(self) -> Request:
        return self._requests.pop(0)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def __len__(self) -> int:
        return len(self._requests)
