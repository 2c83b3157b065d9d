"""The coordinator's deployment: the decode loop, fed by Serve calls and told of model replicas as they come and go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import generate_latest
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from eft_serve.config import AppConfig
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.vocabulary import load_vocabularies
from eft_serve.ensemble import Ensemble
from eft_serve.errors import ModelNotFoundError, UnavailableError
from eft_serve.transport.client import FanOut
from eft_serve.transport.deltas import DeltaSender, Part, ReplyTo
from eft_serve.types import Delta, Endpoint, GenerationRequest, ModelInfo

logger = logging.getLogger(__name__)

DISCOVERY_PERIOD_S = 1.0
DISCOVERY_TIMEOUT_S = 5.0
MAX_MISSES = 3  # rounds that a replica may stay silent while Serve still lists one that is
FIRST_PROOF_S = 3.0  # a coordinator that replaces another waits so long for the models that are there


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What a coordinator says of its models."""

    missing: list[str]  # models of which no replica has answered a step
    models: dict[str, ModelInfo]  # those that have


@dataclass(slots=True, eq=False)
class Reader:
    """Who wants a request's deltas."""

    reply_to: ReplyTo
    done: asyncio.Future[int]  # number of tokens sent, once the last delta has left
    num_sent: int = 0  # tokens; the decode loop's thread alone counts


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
        self.readers: dict[str, Reader] = {}  # by request id
        self.sender = DeltaSender()  # the decode loop's thread's
        vocabularies = load_vocabularies(config)
        self.decode_loop = DecodeLoop(
            config.coordinator, self.backend, vocabularies, self._emit, self.coordinator_metrics
        )
        context = serve.get_replica_context()
        self.process = f"{context.deployment}#{context.replica_id.unique_id}"
        self.event_loop = asyncio.get_running_loop()
        self.decode_loop.start()
        await self._meet_models()
        self.discovery = asyncio.create_task(self._discover())

    async def generate(self, encoded: bytes, reply_to: ReplyTo) -> int:
        """Decode one request (a msgpack `GenerationRequest`); its deltas go straight to the ingress that asked.

        Returns the number of tokens once the last delta has left. Cancelling aborts the request in every model.
        """
        generation = msgspec.msgpack.decode(encoded, type=GenerationRequest)
        ensemble = Ensemble.find(self.config, generation.recipe)
        if ensemble is None:
            raise ModelNotFoundError(f"no recipe or model {generation.recipe!r}", param="model")
        terms, truncate_top_p = ensemble.terms(generation.knobs), ensemble.truncate_top_p(generation.knobs)
        reader = self.readers[generation.request_id] = Reader(reply_to, self.event_loop.create_future())
        self.decode_loop.submit(Request.create(generation, terms, time.monotonic(), truncate_top_p))
        try:
            return await reader.done
        finally:
            del self.readers[generation.request_id]
            self.decode_loop.abort(generation.request_id)

    async def status(self) -> Status:
        """Which models are ready, as this coordinator sees them."""
        infos = {model: next(iter(e.values())).info for model, e in self.endpoints.items() if e}
        return Status(missing=self.decode_loop.missing_models, models=infos)

    async def metrics(self) -> tuple[str, str]:
        """(process, its metrics as Prometheus text)."""
        return self.process, generate_latest(self.coordinator_metrics.registry).decode()

    def check_health(self) -> None:
        """Raises when the decode loop or the discovery has died, so that Serve replaces the replica."""
        if self.decode_loop.error is not None:
            raise RuntimeError("the decode loop died") from self.decode_loop.error
        if self.discovery.done():
            raise RuntimeError("the discovery of model replicas died") from self.discovery.exception()

    async def __del__(self) -> None:
        self.discovery.cancel()
        self.decode_loop.close()
        self.sender.close()

    async def _meet_models(self) -> None:
        """Know the models that are there before the first request comes; those that still load are found later."""
        await self._discover_once()
        deadline = time.monotonic() + FIRST_PROOF_S
        while time.monotonic() < deadline:
            there = {model for model, endpoints in self.endpoints.items() if endpoints}
            if there.isdisjoint(self.decode_loop.missing_models):
                return
            await asyncio.sleep(0.02)

    def _emit(self, deltas: Sequence[tuple[str, Delta]]) -> None:
        """From the decode loop's thread: one message to each ingress for all deltas of a step."""
        parts: dict[str, list[Part]] = defaultdict(list)  # by address
        concerned: dict[str, list[Reader]] = defaultdict(list)
        finished: list[Reader] = []
        for request_id, delta in deltas:
            if reader := self.readers.get(request_id):  # none: its reader has gone away
                parts[reader.reply_to.address].append((request_id, reader.num_sent, delta))
                concerned[reader.reply_to.address].append(reader)
                reader.num_sent += len(delta.token_ids)
                if delta.finish_reason is not None:
                    finished.append(reader)
        for address, readers in concerned.items():
            if not self.sender.send(readers[0].reply_to, parts[address]):
                logger.error("%s does not take its tokens", address)
                self.event_loop.call_soon_threadsafe(_lose, readers)
        if finished:
            self.event_loop.call_soon_threadsafe(_finish, finished)

    async def _discover(self) -> None:
        """Ask every model deployment for its replicas, again and again; the decode loop takes it from there."""
        while True:
            await self._discover_once()
            await asyncio.sleep(DISCOVERY_PERIOD_S)

    async def _discover_once(self) -> None:
        await asyncio.gather(*map(self._find, self.models))
        self.decode_loop.set_replicas({r: e for found in self.endpoints.values() for r, e in found.items()})

    async def _find(self, model: str) -> None:
        """Note the replicas of one model that answer now.

        One that did not answer, or could not be asked, is kept for a few rounds: a hiccup of the control plane costs no
        cache, and whether the replica computes is the data plane's own to find out.
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


def _finish(readers: Sequence[Reader]) -> None:
    for reader in readers:
        if not reader.done.done():
            reader.done.set_result(reader.num_sent)


def _lose(readers: Sequence[Reader]) -> None:
    for reader in readers:
        if not reader.done.done():
            reader.done.set_exception(UnavailableError("the tokens could not be sent; send the request again"))
