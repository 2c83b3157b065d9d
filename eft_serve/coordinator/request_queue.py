"""Requests that wait to be decoded, in order of admission; knows requests and no replicas."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Protocol

from eft_serve.coordinator.request import Request


class RequestQueue(Protocol):
    """Waiting requests, in an order of their own."""

    def add(self, request: Request) -> None:
        """Add a request, new or preempted."""
        ...

    def peek(self) -> Request:
        """The next request to admit; raises IndexError when the queue is empty."""
        ...

    def pop(self) -> Request:
        """Remove and return the next request; raises IndexError when the queue is empty."""
        ...

    def remove(self, request: Request) -> None:
        """Remove this request; raises ValueError when it is not in the queue."""
        ...

    def __iter__(self) -> Iterator[Request]:
        """All requests, the next one first; the queue may change during iteration."""
        ...

    def __len__(self) -> int: ...


class FirstComeFirstServed:
    """By arrival. A preempted request arrived before most others, so it is ahead of them."""

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
