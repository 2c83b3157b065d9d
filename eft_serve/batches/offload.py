"""Threads for calls that wait on storage, apart from those that the server tokenizes and parses in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

NUM_THREADS = 16

P = ParamSpec("P")
T = TypeVar("T")


class Offload:
    """A pool of threads for one event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="files")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The call's result; the event loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    async def each(self, items: Iterator[T]) -> AsyncGenerator[T, None]:
        """What the iterator gives, each item fetched in a thread."""
        while (item := await self.run(next, items, None)) is not None:
            yield item

    def close(self) -> None:
        """Let the threads end; calls that have not begun are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
