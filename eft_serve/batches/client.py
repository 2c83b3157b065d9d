"""Retries a request until the server answers or the deadline passes; knows no files."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

RETRIED = (429, 503)
JSON = {"Content-Type": "application/json"}
FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 15.0


class UnreachedError(Exception):
    """No answer before the deadline; the message has the last attempt's failure."""


async def ask(
    client: httpx.AsyncClient, url: str, body: bytes, timeout_s: float, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """The server's answer, with any status but 429 and 503.

    Args:
        client: with the server's base URL and headers.
        body: JSON.
        timeout_s: for all attempts and the waits between them.
        headers: of this request, besides the client's.

    Raises:
        UnreachedError: no answer in time, or the server asks to wait for longer than that.
    """
    deadline = time.monotonic() + timeout_s
    backoff_s = FIRST_BACKOFF_S
    last = "no answer"
    while (left_s := deadline - time.monotonic()) > 0:
        pause_s = backoff_s * random.uniform(0.5, 1.0)  # noqa: S311, not a secret: spreads the retries
        try:
            async with asyncio.timeout(left_s):
                response = await client.post(url, content=body, headers={**JSON, **(headers or {})})
        except TimeoutError:
            break
        except httpx.RequestError as error:
            last = f"{type(error).__name__}: {error}"
        else:
            if response.status_code not in RETRIED:
                return response
            last = f"status {response.status_code}"
            pause_s = max(pause_s, retry_after_s(response.headers.get("retry-after")))
        if time.monotonic() + pause_s >= deadline:
            break
        await asyncio.sleep(pause_s)
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
    raise UnreachedError(f"no answer within {timeout_s:g} s; last: {last}")


def body_of(response: httpx.Response) -> Any:
    """The answer's JSON, or the text of a proxy's own error page."""
    try:
        return response.json()
    except ValueError:
        return response.text


def retry_after_s(value: str | None) -> float:
    """Seconds to wait by a `Retry-After` header (RFC 9110: seconds or a date); 0 if it is missing or invalid."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
