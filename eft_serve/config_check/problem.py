"""The result of a check; knows no check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration."""

    path: str  # of the field, e.g. models.base.path
    message: str  # what is wrong, and the remedy
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: {self.message}"
