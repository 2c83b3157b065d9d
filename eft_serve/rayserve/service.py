"""The API's `Service` over Serve handles, which list the replicas; requests and deltas travel on the data plane."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from eft_serve.config import AppConfig
from eft_serve.errors import UnavailableError
from eft_serve.rayserve.coordinator import Status
from eft_serve.serving.generation_client import GenerationClient
from eft_serve.serving.metrics import exposition
from eft_serve.types import Delta, GenerationRequest, Listener, ModelInfo

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 3.0
METRICS_TIMEOUT_S = 3.0
DISCOVERY_TIMEOUT_S = 5.0


class ServeService:
    """One ingress's view of the application; created and used on one event loop."""

    def __init__(
        self, config: AppConfig, coordinator: DeploymentHandle[Any], models: dict[str, DeploymentHandle[Any]]
    ) -> None:
        self.config = config
        self.coordinator = coordinator
        self.models = models
        self.infos: dict[str, ModelInfo] = {}
        self.coordinators: dict[str, Listener] = {}  # by replica id
        self.client = GenerationClient(host=ray.util.get_node_ip_address())

    def close(self) -> None:
        """Close all sockets."""
        self.client.close()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `eft_serve.api.service.Service.generate`."""
        return self.client.generate(request)

    async def check_ready(self) -> None:
        """See `eft_serve.api.service.Service.check_ready`."""
        try:
            answers = await self.coordinator.broadcast("status").results_async(
                timeout_s=STATUS_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            raise UnavailableError("no coordinator answers yet") from error
        statuses = [answer for answer in answers if isinstance(answer, Status)]
        if not statuses:
            raise UnavailableError("no coordinator answers yet")
        for status in statuses:
            self.infos |= status.models
        fewest = min((status.missing for status in statuses), key=len)  # one ready coordinator is enough
        if not self.client.ready:
            raise UnavailableError("no coordinator is connected yet")
        if fewest:
            raise UnavailableError(f"no replica has answered a step yet of: {', '.join(sorted(fewest))}")

    async def watch(self, period_s: float = 1.0) -> None:
        """Keep the coordinators and the models' state up to date; runs as a task."""
        while True:
            await self._discover()
            if self.infos.keys() != self.models.keys():
                try:
                    await self.check_ready()
                except UnavailableError as error:
                    logger.debug("not ready: %s", error)
            await asyncio.sleep(period_s)

    async def _discover(self) -> None:
        """Connect to the coordinators that answer.

        One that does not answer is kept: its connection shows whether it is alive.
        """
        try:
            answers = await self.coordinator.broadcast(
                "connect", self.client.public_key, self.client.reply_to
            ).results_async(timeout_s=DISCOVERY_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []  # Serve lists none
        except (TimeoutError, RayError) as error:
            logger.warning("the coordinators could not be asked: %r", error)
            return
        found = {answer.replica_id: answer for answer in answers if isinstance(answer, Listener)}
        self.coordinators = self.coordinators | found if len(found) < len(answers) else found
        self.client.set_coordinators(self.coordinators)

    async def metrics(self) -> bytes:
        """Every model's and coordinator's metrics; replicas that do not answer in time are counted as silent."""
        handles = [self.coordinator, *self.models.values()]
        answers = [answer for found in await asyncio.gather(*map(_replica_metrics, handles)) for answer in found]
        num_silent = sum(not process for process, _ in answers)
        return exposition({process: text for process, text in answers if process}, num_silent)

    def max_model_len(self, model: str) -> int:
        """See `eft_serve.api.service.Service.max_model_len`."""
        info = self.infos.get(model)
        if info is None:
            raise UnavailableError(f"model {model} is not ready")
        return info.max_model_len


async def _replica_metrics(handle: DeploymentHandle[Any]) -> list[tuple[str, str]]:
    """(process, text) of every replica; an empty process for one that did not answer."""
    try:
        answers = await handle.broadcast("metrics").results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, RayError, DeploymentUnavailableError):
        return [("", "")]
    return [answer if isinstance(answer, tuple) else ("", "") for answer in answers]
