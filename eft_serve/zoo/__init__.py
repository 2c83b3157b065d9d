"""The embedded model family: names and places of five small checkpoints. Knows no model library and loads nothing."""

from __future__ import annotations

from pathlib import Path

from eft_serve.config import ZOO_CHECKPOINTS

NAMES = ("base-large", "base-small", "tuned-small", "tuned-large", "tuned-small-harmless")
CHECKPOINTS = ZOO_CHECKPOINTS


def checkpoint_path(name: str) -> Path:
    """The directory of a shipped checkpoint, in the format that transformers loads."""
    if name not in NAMES:
        raise ValueError(f"unknown zoo checkpoint {name!r}; known: {', '.join(NAMES)}")
    return CHECKPOINTS / name
