"""A coordinator's server over counting models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from counting_models import CONFIG, CountingBackend, DigitVocabulary, endpoint

from eft_serve.config import AppConfig
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.serving.coordinator_server import CoordinatorServer


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


@pytest.fixture
def server(backend: CountingBackend, request: pytest.FixtureRequest) -> Iterator[CoordinatorServer]:
    config = AppConfig.parse({**CONFIG, "coordinator": getattr(request, "param", {})})
    vocabularies: dict[str, Any] = dict.fromkeys(config.deployments, DigitVocabulary())
    server = CoordinatorServer(config, backend, vocabularies, CoordinatorMetrics())
    server.start()
    server.decode_loop.set_replicas({model: endpoint(model) for model in config.deployments})
    yield server
    backend.gate.set()
    server.close()
