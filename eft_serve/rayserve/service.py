"""The API's `Service` over Ray Serve handles: requests go to a coordinator and come back as a stream of deltas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from eft_serve.config import AppConfig
from eft_serve.errors import EftServeError, UnavailableError
from eft_serve.rayserve.coordinator import Status
from eft_serve.rayserve.metrics import merge
from eft_serve.types import Delta, GenerationRequest, ModelInfo

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 3.0
METRICS_TIMEOUT_S = 3.0


class ServeService:
    """One ingress's view of the application."""

    def __init__(
        self, config: AppConfig, coordinator: DeploymentHandle[Any], models: dict[str, DeploymentHandle[Any]]
    ) -> None:
        self.config = config
        self.coordinator = coordinator
        self.models = models
        self.infos: dict[str, ModelInfo] = {}

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `eft_serve.api.service.Service.generate`."""
        stream = self.coordinator.options(stream=True).generate.remote(msgspec.msgpack.encode(request))
        assert isinstance(stream, DeploymentResponseGenerator)
        finished = False
        try:
            async for encoded in stream:
                delta = msgspec.msgpack.decode(encoded, type=Delta)
                finished = delta.finish_reason is not None
                yield delta
        except RayTaskError as error:
            finished = True
            if isinstance(error.cause, EftServeError):
                raise error.cause from None
            raise
        except (RayActorError, DeploymentUnavailableError) as error:
            finished = True
            raise UnavailableError("the coordinator is being replaced; send the request again") from error
        finally:
            if not finished:
                stream.cancel()

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
        if fewest:
            raise UnavailableError(f"no replica has answered a step yet of: {', '.join(sorted(fewest))}")

    async def watch(self, period_s: float = 1.0) -> None:
        """Learn what the models are, until all are known; to be run as a task."""
        while self.infos.keys() != self.models.keys():
            try:
                await self.check_ready()
            except UnavailableError as error:
                logger.debug("not ready: %s", error)
            await asyncio.sleep(period_s)

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
