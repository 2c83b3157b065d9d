"""Tests of what only a GPU can show; without one all are skipped. Needs nothing of the other conftests.

`EFT_GPU_TEST_DEVICE=cpu` runs the same bodies on a CPU, which tests the tests.
"""

# ruff: noqa: E402 - the environment and the helpers' directories come before what reads them
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
UNIT = Path(__file__).parent.parent / "unit"
sys.path += [str(UNIT / "numerics"), str(UNIT / "engine")]  # their helpers

import pytest
import torch
from gpu_models import Stock, load_engine, save

from eft_serve.engine.engine import Engine

DEVICE = torch.device(os.environ.get("EFT_GPU_TEST_DEVICE", "cuda"))


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is visible here")
    return DEVICE


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """For what a CPU has no counterpart of."""
    if device.type != "cuda":
        pytest.skip("of a GPU alone")
    return device


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small random model, made at first use."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(architecture: str) -> Path:
        path = root / architecture
        return path if path.exists() else save(architecture, path)

    return get


@pytest.fixture(scope="session")
def stock(checkpoints: Callable[[str], Path], device: torch.device) -> Callable[[str], Stock]:
    """Plain transformers on the same device."""
    loaded: dict[str, Stock] = {}

    def get(architecture: str) -> Stock:
        if architecture not in loaded:
            loaded[architecture] = Stock(checkpoints(architecture), device)
        return loaded[architecture]

    return get


@pytest.fixture
def load(
    checkpoints: Callable[[str], Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    """Load an engine, which is closed after the test."""
    engines: list[Engine] = []

    def get(architecture: str, dtype: str, backend: str | None = None, **settings: Any) -> Engine:
        engines.append(load_engine(checkpoints(architecture), device, dtype, backend, monkeypatch, **settings))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()
