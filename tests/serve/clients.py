"""Packages of clients that tests ask the live application with, and what those tests have in common."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from harness import ROOT
from pydantic import BaseModel, ConfigDict

INSTALLED = ROOT / ".cache" / "clients"  # not in the server's environment: Ray would import pandas wherever it finds it
sys.path.append(str(INSTALLED))

CITIES = ("Lima", "Quito")
JSON_TOKENS = 1024  # for one `Answer` or call: a model that was never taught JSON indents as far as grammars let it
QUESTION = "What is the capital of Peru?"
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": list(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": ARGUMENTS},
}


class Answer(BaseModel):
    """What a grammar makes of models that were never taught JSON: few texts, so that it ends."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Lima", "Quito"]
    sure: bool


def unavailable(what: str) -> None:
    """Skip on a developer's machine; fail where everything must be there."""
    reason = f"{what} is missing: `make install-clients` installs it"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


def package(name: str) -> ModuleType:
    """A client's package; without it the tests of a module are skipped, and fail in CI."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        unavailable(name)
        raise


def executable(path: Path) -> Path:
    """The same for a file."""
    if not path.exists():
        unavailable(str(path))
    return path
