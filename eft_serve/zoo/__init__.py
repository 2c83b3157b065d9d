"""The embedded model families: names and places of small checkpoints. Knows no model library and loads nothing."""

from __future__ import annotations

from pathlib import Path

from eft_serve.config import ZOO_CHECKPOINTS

ROLES = ("base-large", "base-small", "tuned-small", "tuned-large", "tuned-small-harmless")
PREFIXES = {"llama": "", "falcon": "falcon-"}  # of a family's names
FAMILIES = {family: tuple(prefix + role for role in ROLES) for family, prefix in PREFIXES.items()}
NAMES = tuple(name for names in FAMILIES.values() for name in names)
CHECKPOINTS = ZOO_CHECKPOINTS


def checkpoint_path(name: str) -> Path:
    """The directory of a shipped checkpoint, in the format that transformers loads."""
    if name not in NAMES:
        raise ValueError(f"unknown zoo checkpoint {name!r}; known: {', '.join(NAMES)}")
    return CHECKPOINTS / name
