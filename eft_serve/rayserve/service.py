"""The API's `Service`: a request goes to a coordinator by Serve handle, its deltas come back by the data plane."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from eft_serve.config import AppConfig
from eft_serve.errors import EftServeError, UnavailableError
from eft_serve.rayserve.coordinator import Status
from eft_serve.rayserve.mailbox import Mailbox
from eft_serve.rayserve.metrics import merge
from eft_serve.transport.deltas import DeltaReceiver, Part
from eft_serve.types import Delta, GenerationRequest, ModelInfo

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 3.0
METRICS_TIMEOUT_S = 3.0
LATE_DELTAS_S = 5.0  # after the coordinator said that it has sent the last


class ServeService:
    """One ingress's view of the application; made and used on one event loop."""

    def __init__(
        self, config: AppConfig, coordinator: DeploymentHandle[Any], models: dict[str, DeploymentHandle[Any]]
    ) -> None:
        self.config = config
        self.coordinator = coordinator
        self.models = models
        self.infos: dict[str, ModelInfo] = {}
        self.mailboxes: dict[str, Mailbox] = {}  # by request id
        self.event_loop = asyncio.get_running_loop()
        self.receiver = DeltaReceiver(self._receive, host=ray.util.get_node_ip_address())

    def close(self) -> None:
        """Listen no longer."""
        self.receiver.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `eft_serve.api.service.Service.generate`."""
        mailbox = self.mailboxes[request.request_id] = Mailbox()
        response = self.coordinator.generate.remote(msgspec.msgpack.encode(request), self.receiver.reply_to)
        assert isinstance(response, DeploymentResponse)
        watch = asyncio.create_task(_watch(response, mailbox))
        try:
            async for delta in mailbox.read():
                yield delta
        finally:
            del self.mailboxes[request.request_id]
            watch.cancel()
            if not mailbox.complete:
                response.cancel()

    def _receive(self, parts: Sequence[Part]) -> None:
        """From the receiver's thread: one hop to the event loop for all deltas of a step."""
        self.event_loop.call_soon_threadsafe(self._deliver, parts)

    def _deliver(self, parts: Sequence[Part]) -> None:
        for request_id, num_before, delta in parts:
            if mailbox := self.mailboxes.get(request_id):  # none: its reader has gone away
                mailbox.put(num_before, delta)

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


async def _watch(response: DeploymentResponse[int], mailbox: Mailbox) -> None:
    """Tell the reader when the coordinator ends without having sent all."""
    try:
        await response
        await asyncio.sleep(LATE_DELTAS_S)
        mailbox.fail(UnavailableError("the last tokens were lost; send the request again"))
    except RayTaskError as error:
        mailbox.fail(error.cause if isinstance(error.cause, EftServeError) else error)
    except (RayActorError, DeploymentUnavailableError):
        mailbox.fail(UnavailableError("the coordinator is being replaced; send the request again"))
    except Exception as error:  # the reader's to raise, whatever it is
        mailbox.fail(error)


async def _replica_metrics(handle: DeploymentHandle[Any]) -> list[tuple[str, str]]:
    """(process, text) of every replica; an empty process for one that did not answer."""
    try:
        answers = await handle.broadcast("metrics").results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, RayError, DeploymentUnavailableError):
        return [("", "")]
    return [answer if isinstance(answer, tuple) else ("", "") for answer in answers]
