"""The base of every configuration section."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Frozen(BaseModel):
    """A section: immutable, refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _check_name(name: str) -> str:
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError(f"name {name!r} may hold letters, digits, '-', '_' and '.' only")
    return name


Name = Annotated[str, AfterValidator(_check_name)]
