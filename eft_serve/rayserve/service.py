"""The API's `Service`: requests and their deltas travel on the data plane, Serve handles only say who is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from eft_serve.config import AppConfig
from eft_serve.errors import EftServeError, UnavailableError
from eft_serve.rayserve.coordinator import Status
from eft_serve.serving.metrics import merge
from eft_serve.serving.output_collector import OutputCollector
from eft_serve.transport.coordinator_client import CoordinatorClient
from eft_serve.transport.deltas import DeltaReceiver, Part
from eft_serve.types import Delta, GenerationRequest, Listener, ModelInfo

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 3.0
METRICS_TIMEOUT_S = 3.0
DISCOVERY_TIMEOUT_S = 5.0
FIND_TIMEOUT_S = 5.0  # a coordinator may just be starting


class ServeService:
    """One ingress's view of the application; made and used on one event loop."""

    def __init__(
        self, config: AppConfig, coordinator: DeploymentHandle[Any], models: dict[str, DeploymentHandle[Any]]
    ) -> None:
        self.config = config
        self.coordinator = coordinator
        self.models = models
        self.infos: dict[str, ModelInfo] = {}
        self.collectors: dict[str, OutputCollector] = {}  # by request id
        self.event_loop = asyncio.get_running_loop()
        self.coordinators: dict[str, Listener] = {}  # by replica id
        self.coordinator_client = CoordinatorClient(self._fail)
        self.receiver = DeltaReceiver(self._receive, host=ray.util.get_node_ip_address())

    def close(self) -> None:
        """Neither send nor listen any longer."""
        self.coordinator_client.close()
        self.receiver.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `eft_serve.api.service.Service.generate`."""
        await self._find_coordinator()
        collector = self.collectors[request.request_id] = OutputCollector()
        try:
            self.coordinator_client.submit(request, self.receiver.reply_to.address)
            async for delta in collector.read():
                yield delta
        finally:
            del self.collectors[request.request_id]
            self.coordinator_client.end(request.request_id, complete=collector.complete)

    async def _find_coordinator(self) -> None:
        """Return when one is connected, or after a while: then the request is refused."""
        deadline = time.monotonic() + FIND_TIMEOUT_S
        while not self.coordinator_client.ready and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _fail(self, request_id: str, error: EftServeError) -> None:
        if collector := self.collectors.get(request_id):  # none: its reader has gone away
            collector.fail(error)

    def _receive(self, parts: Sequence[Part]) -> None:
        """From the receiver's thread: one hop to the event loop for all deltas of a step."""
        self.event_loop.call_soon_threadsafe(self._deliver, parts)

    def _deliver(self, parts: Sequence[Part]) -> None:
        for request_id, num_before, delta in parts:
            if collector := self.collectors.get(request_id):  # none: its reader has gone away
                collector.put(num_before, delta)

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
        fewest = min((status.missing for status in statuses), key=len)  # one that can serve is enough
        if not self.coordinator_client.ready:
            raise UnavailableError("no coordinator is connected yet")
        if fewest:
            raise UnavailableError(f"no replica has answered a step yet of: {', '.join(sorted(fewest))}")

    async def watch(self, period_s: float = 1.0) -> None:
        """Keep up with the coordinators, and learn what the models are; to be run as a task."""
        while True:
            await self._discover()
            if self.infos.keys() != self.models.keys():
                try:
                    await self.check_ready()
                except UnavailableError as error:
                    logger.debug("not ready: %s", error)
            await asyncio.sleep(period_s)

    async def _discover(self) -> None:
        """Connect to the coordinators that answer now.

        One that is silent, or could not be asked, is kept: its connection says whether it is there.
        """
        try:
            answers = await self.coordinator.broadcast(
                "connect", self.coordinator_client.public_key, self.receiver.reply_to
            ).results_async(timeout_s=DISCOVERY_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []  # Serve knows of none
        except (TimeoutError, RayError) as error:
            logger.warning("the coordinators could not be asked: %r", error)
            return
        found = {answer.replica_id: answer for answer in answers if isinstance(answer, Listener)}
        self.coordinators = self.coordinators | found if len(found) < len(answers) else found
        self.coordinator_client.set_coordinators(self.coordinators)

    async def metrics(self) -> bytes:
        """Every model's and coordinator's metrics; a replica that does not answer in time is counted as silent."""
        handles = [self.coordinator, *self.models.values()]
        answers = [answer for found in await asyncio.gather(*map(_replica_metrics, handles)) for answer in found]
        expositions = {process: text for process, text in answers if process}
        up = "".join(f'eft_process_up{{process="{process}"}} 1\n' for process in expositions)
        silent = len(answers) - len(expositions)
        return (
            merge(expositions)
            + "# HELP eft_process_up Processes whose metrics are in this scrape\n# TYPE eft_process_up gauge\n"
            + up
            + "# HELP eft_process_silent Replicas and deployments that did not answer this scrape\n"
            + f"# TYPE eft_process_silent gauge\neft_process_silent {silent}\n"
        ).encode()

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
