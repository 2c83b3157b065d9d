"""The coordinator's deployment: the decode loop behind its server, and the discovery of model replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import msgspec
import ray
from prometheus_client import generate_latest
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from eft_serve.config import AppConfig
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.vocabularies import load_vocabularies
from eft_serve.serving.coordinator_server import CoordinatorServer
from eft_serve.transport.client import FanOut
from eft_serve.transport.deltas import ReplyTo
from eft_serve.types import Endpoint, Listener, ModelInfo

logger = logging.getLogger(__name__)

DISCOVERY_PERIOD_S = 1.0
DISCOVERY_TIMEOUT_S = 5.0
MAX_MISSES = 3  # rounds without an answer before a replica is dropped, while Serve lists one that does not answer
DRAIN_S = 8.0  # of the time that Serve gives a replica to stop
FIRST_PROOF_S = 3.0  # how long a new coordinator waits for running models to answer a step


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A coordinator's view of its models."""

    missing: list[str]  # models of which no replica has answered a step
    models: dict[str, ModelInfo]  # models with a replica that has


class CoordinatorReplica:
    """One coordinator; owns its requests and their tokens."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: AppConfig, models: dict[str, DeploymentHandle[Any]]
    ) -> None:
        self.config = config
        self.models = models
        self.coordinator_metrics = CoordinatorMetrics()
        self.backend = FanOut()
        self.endpoints: dict[str, dict[str, Endpoint]] = {model: {} for model in models}  # by model, by replica id
        self.misses: dict[str, int] = {}  # by replica id
        vocabularies = load_vocabularies(config)
        host = ray.util.get_node_ip_address()
        self.server = CoordinatorServer(config, self.backend, vocabularies, self.coordinator_metrics, host)
        self.decode_loop = self.server.decode_loop
        context = serve.get_replica_context()
        self.process = f"{context.deployment}#{context.replica_id.unique_id}"
        self.listener = Listener(
            replica_id=context.replica_id.unique_id,
            address=self.server.submissions.address,
            public_key=self.server.submissions.public_key,
        )
        self.server.start()
        await self._meet_models()
        self.discovery = asyncio.create_task(self._discover())

    async def connect(self, public_key: bytes, reply_to: ReplyTo) -> Listener:
        """Let this ingress submit requests and receive their deltas; idempotent."""
        self.server.connect_ingress(public_key, reply_to)
        return self.listener

    async def status(self) -> Status:
        """Which models are ready, as seen by this coordinator."""
        infos = {model: next(iter(e.values())).info for model, e in self.endpoints.items() if e}
        return Status(missing=self.decode_loop.missing_models, models=infos)

    async def metrics(self) -> tuple[str, str]:
        """(process, its metrics as Prometheus text)."""
        return self.process, generate_latest(self.coordinator_metrics.registry).decode()

    def check_health(self) -> None:
        """Raises when the decode loop, its server or the discovery has died, so that Serve replaces the replica."""
        self.server.submissions.check()
        if self.decode_loop.error is not None:
            raise RuntimeError("the decode loop died") from self.decode_loop.error
        if self.discovery.done():
            raise RuntimeError("the discovery of model replicas died") from self.discovery.exception()

    async def __del__(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        while self.server.subscribers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.discovery.cancel()
        self.server.close()

    async def _meet_models(self) -> None:
        """Connect to the running models before the first request; models still loading are found later."""
        await self._discover_once()
        deadline = time.monotonic() + FIRST_PROOF_S
        while time.monotonic() < deadline:
            there = {model for model, endpoints in self.endpoints.items() if endpoints}
            if there.isdisjoint(self.decode_loop.missing_models):
                return
            await asyncio.sleep(0.02)

    async def _discover(self) -> None:
        """Ask every model deployment for its replicas periodically, and pass them to the decode loop."""
        while True:
            await self._discover_once()
            await asyncio.sleep(DISCOVERY_PERIOD_S)

    async def _discover_once(self) -> None:
        await asyncio.gather(*map(self._find, self.models))
        self.decode_loop.set_replicas({r: e for found in self.endpoints.values() for r, e in found.items()})

    async def _find(self, model: str) -> None:
        """Update the replicas of one model.

        A replica that did not answer is kept for a few rounds: a hiccup of the control plane must cost no cache, and
        the data plane itself finds out whether the replica computes.
        """
        try:
            answers = await (
                self.models[model]
                .broadcast("connect", self.backend.public_key)
                .results_async(timeout_s=DISCOVERY_TIMEOUT_S, return_exceptions=True)
            )
        except DeploymentUnavailableError:
            answers = []  # Serve knows of no replica
        except (TimeoutError, RayError) as error:
            logger.warning("model %s: its replicas could not be asked: %r", model, error)
            return
        found = {answer.replica_id: answer for answer in answers if isinstance(answer, Endpoint)}
        silent = len(answers) - len(found)
        known = self.endpoints[model]
        self.misses |= {r: self.misses.get(r, 0) + 1 for r in known.keys() - found.keys()}
        kept = {r: e for r, e in known.items() if r not in found and silent and self.misses[r] < MAX_MISSES}
        self.endpoints[model] = kept | found
        for replica_id in found.keys() | (known.keys() - kept.keys()):
            self.misses.pop(replica_id, None)
