"""The base of every configuration section."""

from __future__ import annotations

import re
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


ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def _check_origin(origin: str) -> str:
    if origin == ANY_ORIGIN:
        return origin
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        raise ValueError(
            f"{origin!r} is no origin: write scheme://host or scheme://host:port in lower case, and no path"
        )
    scheme, _, port = found.groups()
    if port is not None and port == _DEFAULT_PORTS.get(scheme):
        raise ValueError(f"{origin!r}: browsers leave the default port out; write it without {port}")
    return origin


Origin = Annotated[str, AfterValidator(_check_origin)]
"""An origin as browsers send it, or `*` for all."""
