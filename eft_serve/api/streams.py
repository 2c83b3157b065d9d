"""Streams of deltas: checked, merged, and cancelled as soon as the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from eft_serve.errors import EngineError, UnavailableError, from_failure
from eft_serve.types import Delta, FinishReason

Indexed = tuple[int, Delta]


async def checked(index: int, stream: AsyncGenerator[Delta, None]) -> AsyncGenerator[Indexed, None]:
    """The stream up to its finish reason, each delta with its choice's index.

    Raises:
        EftServeError: the stream's failure; also when it was aborted or ended without a reason.
    """
    async with aclosing(stream):
        async for delta in stream:
            if delta.failure is not None:
                raise from_failure(delta.failure)
            if delta.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                raise UnavailableError("the server gave the request up; send it again")
            yield index, delta
            if delta.finish_reason is not None:
                return
    raise EngineError("the answer broke off without a finish reason; send the request again")


async def merged(streams: Sequence[AsyncGenerator[Indexed, None]]) -> AsyncGenerator[Indexed, None]:
    """What any of the streams yields, as it comes; the first error ends them all."""
    ready: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(stream: AsyncGenerator[Indexed, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await ready.put(item)
            await ready.put(None)
        except Exception as error:
            await ready.put(error)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_running = len(pumps)
        while num_running:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        await _cancelled(*pumps)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """Run `work` until the client goes away, or stops reading and `timeout_s` seconds have passed.

    Raises:
        ClientDisconnect: it went away; `work` was cancelled and has ended.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        await working
    finally:
        await _cancelled(working, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
