"""The JSON files of a model directory; knows nothing of their contents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class BrokenFileError(Exception):
    """A file that cannot be used; the message names it and the reason."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenFileError: it cannot be read, or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise BrokenFileError(f"{path} is not a JSON object")
    return data
