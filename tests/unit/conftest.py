"""Unit tests run in seconds and cannot start Ray."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _disallow_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a unit test tried to start Ray; put it into tests/serve")

    ray = sys.modules.get("ray")
    if ray is not None:
        monkeypatch.setattr(ray, "init", refuse)
    else:
        monkeypatch.setitem(sys.modules, "ray", None)
