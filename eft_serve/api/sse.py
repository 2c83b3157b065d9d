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

_LINE_BREAKS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))
"""Some clients split lines at these too."""

_encoder = msgspec.json.Encoder()


def encode(event: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event, always a single `data` line: JSON escapes line breaks, and Unicode's other ones are escaped here.

    Args:
        name: of the event, for an `event` line before it.
    """
    data = _encoder.encode(event)
    for raw, escaped in _LINE_BREAKS:
        data = data.replace(raw, escaped)
    line = b"" if name is None else b"event: " + name.encode() + b"\n"
    return line + b"data: " + data + b"\n\n"
