"""Engines over tiny random models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Clock, build_config, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from eft_serve.config import ModelConfig
from eft_serve.engine.engine import Engine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, made at first use."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(architecture: str) -> Path:
        path = root / architecture
        return path if path.exists() else save_model(build_config(architecture), path)

    return get


@pytest.fixture(scope="session")
def references(checkpoints: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The stock model of an architecture, attention computed the plainest way."""
    models: dict[str, PreTrainedModel] = {}

    def get(architecture: str) -> PreTrainedModel:
        if architecture not in models:
            plain = "sdpa" if architecture == "falcon-alibi" else "eager"  # the eager one adds the bias twice
            models[architecture] = AutoModelForCausalLM.from_pretrained(
                checkpoints(architecture), attn_implementation=plain
            )
        return models[architecture]

    return get


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def load(checkpoints: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """Load an engine over a tiny model; engines are shared within a test module and closed after it."""
    engines: dict[str, Engine] = {}

    def get(architecture: str, clock: Clock | None = None, **settings: Any) -> Engine:
        key = f"{architecture} {sorted(settings.items())} {id(clock)}"
        if key not in engines:
            config = ModelConfig(path=str(checkpoints(architecture)), **settings)
            engines[key] = Engine.load(architecture, config, **({"clock": clock} if clock else {}))
        return engines[key]

    yield get
    for engine in engines.values():
        engine.close()
