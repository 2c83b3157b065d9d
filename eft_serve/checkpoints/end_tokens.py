"""The end tokens that the files of a model directory name; knows no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eft_serve.checkpoints.json_file import BrokenFileError, read_json

FILES = ("generation_config.json", "config.json")  # the first file with the field decides, as in `generate`


def read_end_tokens(checkpoint: Path) -> frozenset[int] | None:
    """The ids that `generate` would stop at; None if no file names any.

    Raises:
        BrokenFileError: a file cannot be read, or the field is not made of ids.
    """
    for path in (checkpoint / name for name in FILES):
        found: Any = read_json(path).get("eos_token_id") if path.exists() else None
        if found is None or found == []:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise BrokenFileError(f"{path}: eos_token_id is {found!r}, not an id or a list of ids")
        return frozenset(ids)
    return None
