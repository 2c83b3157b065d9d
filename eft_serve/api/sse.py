"""Server-sent events: `data: <json>` and an empty line, encoded in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # otherwise nginx would buffer tokens
)

_encoder = msgspec.json.Encoder()


def encode(event: Mapping[str, Any]) -> bytes:
    """One event; JSON holds no raw line break, so it is always a single `data` line."""
    return b"data: " + _encoder.encode(event) + b"\n\n"
