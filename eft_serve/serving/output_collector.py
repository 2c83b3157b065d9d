"""Queues a request's deltas for a reader on the event loop; a read gives all that are ready, merged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec

from eft_serve.errors import CoordinatorLostError
from eft_serve.types import Delta


def merge(deltas: Sequence[Delta]) -> Delta:
    """One delta with the content of all of these, in order."""
    if len(deltas) == 1:
        return deltas[0]
    components = [each for delta in deltas for each in delta.components or ()]
    return msgspec.structs.replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        components=components or None,
        prompt_logprobs=[each for delta in deltas for each in delta.prompt_logprobs],
    )


class OutputCollector:
    """Deltas of one request; a slow reader gets fewer and larger ones. Used only on the event loop.

    Args:
        num_tokens: that its reader was told of before.
    """

    def __init__(self, num_tokens: int = 0) -> None:
        self._deltas: list[Delta] = []
        self._ready = asyncio.Event()
        self._num_tokens = num_tokens
        self._error: BaseException | None = None
        self.complete = False  # the last delta is here

    def put(self, num_before: int, delta: Delta) -> None:
        """Add the next delta; `num_before` is the number of tokens before it."""
        if num_before != self._num_tokens:
            self.fail(
                CoordinatorLostError(f"tokens {self._num_tokens} to {num_before} were lost; send the request again")
            )
            return
        self._num_tokens += delta.num_tokens
        self._deltas.append(delta)
        self.complete = delta.finish_reason is not None
        self._ready.set()

    def fail(self, error: BaseException) -> None:
        """No more deltas will come: the reader gets the earlier ones, then this error, unless they are complete."""
        self._error = self._error or error
        self._ready.set()

    async def read(self) -> AsyncIterator[Delta]:
        """Yield deltas until the one with a finish reason.

        Raises:
            The error given to `fail`; `CoordinatorLostError` when tokens were lost.
        """
        while True:
            await self._ready.wait()
            if not self._deltas and self._error is not None:
                raise self._error
            deltas, self._deltas = self._deltas, []
            if self._error is None:
                self._ready.clear()
            if deltas[-1].failure is not None and len(deltas) > 1:  # the reader stops at a failure
                yield merge(deltas[:-1])
                del deltas[:-1]
            delta = merge(deltas)
            yield delta
            if delta.finish_reason is not None:
                return
