"""Between the decode loop's thread and a reader on the event loop: whatever became ready since the last read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from eft_serve.types import Delta


def merge(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what all of these say, in order."""
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        finish_reason=deltas[-1].finish_reason,
        failure=deltas[-1].failure,
    )


class Mailbox:
    """Deltas of one request; a slow reader gets fewer and larger ones."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._ready = asyncio.Event()

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._ready.set()

    async def read(self) -> AsyncIterator[Delta]:
        """Until the delta that has a finish reason."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            deltas, self._deltas = self._deltas, []
            delta = merge(deltas)
            yield delta
            if delta.finish_reason is not None:
                return
