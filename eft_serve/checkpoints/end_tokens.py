"""Which tokens end a text, by the files of a model directory; knows no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eft_serve.checkpoints.json_file import BrokenFileError, read_json

FILES = ("generation_config.json", "config.json")  # the first that says it is believed, as `generate` does


def read_end_tokens(checkpoint: Path) -> frozenset[int] | None:
    """The ids that `generate` would stop at; None where no file says it, and the tokenizer decides.

    Raises:
        BrokenFileError: a file cannot be read, or names something else than ids.
    """
    for path in (checkpoint / name for name in FILES):
        found: Any = read_json(path).get("eos_token_id") if path.exists() else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(token_id, int) for token_id in ids):
            raise BrokenFileError(f"{path}: eos_token_id is {found!r}, neither an id nor a list of ids")
        return frozenset(ids)
    return None
