"""A model's deployment: an engine, and the socket through which coordinators step it.

Ray carries rare calls only: `connect` returns the endpoint and takes the caller's public key. Tokens and logits never
pass through here.
"""

from __future__ import annotations

import logging
from pathlib import Path

import ray
from prometheus_client import generate_latest
from ray import serve

from eft_serve.config import ModelConfig
from eft_serve.engine.engine import Engine
from eft_serve.transport.server import StepServer
from eft_serve.types import Endpoint

logger = logging.getLogger(__name__)


class ModelReplica:
    """One replica of one model and its adapters."""

    def __init__(self, name: str, config: ModelConfig, adapters: dict[str, Path]) -> None:
        self.engine = Engine.load(name, config, adapters)
        self.server = StepServer(self.engine, host=ray.util.get_node_ip_address())
        self.server.start()
        context = serve.get_replica_context()
        self.endpoint = Endpoint(
            replica_id=context.replica_id.unique_id,
            address=self.server.address,
            public_key=self.server.public_key,
            info=self.engine.info,
        )
        self.process = f"{context.deployment}#{context.replica_id.unique_id}"
        logger.info("%s listens on %s: %s", self.process, self.server.address, self.engine.info)

    async def connect(self, client_public_key: bytes) -> Endpoint:
        """Let this coordinator step the engine; idempotent."""
        self.server.allow(client_public_key)
        return self.endpoint

    async def metrics(self) -> tuple[str, str]:
        """(process, its metrics as Prometheus text)."""
        registries = (self.engine.registry, self.server.metrics.registry)
        return self.process, "".join(generate_latest(registry).decode() for registry in registries)

    def check_health(self) -> None:
        """Raises when the engine's thread has failed, so that Serve replaces the replica."""
        self.server.check()

    def __del__(self) -> None:
        if server := getattr(self, "server", None):
            server.close()
        if engine := getattr(self, "engine", None):
            engine.close()
