"""Waits for what another thread, task or process does a moment later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TIMEOUT_S = 10.0


def wait_until(condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Block until the condition is true; raises AssertionError after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)


async def until(condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Let the event loop run until the condition is true; raises AssertionError after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        await asyncio.sleep(0.005)
