"""Servers with files and batches over fake services, and the steps of a batch by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final

import openai
from api_fakes import Answer, FakeService, Stack
from openai.types import Batch
from prometheus_client import CollectorRegistry

from eft_serve.api.app import create_app
from eft_serve.api.prompts import PromptRenderer
from eft_serve.batches.service import BatchService
from eft_serve.batches.watch import Timing
from eft_serve.config import AppConfig

QUICK = Timing(look_s=0.05, beat_s=0.05, lease_s=1.0)
CHAT: Final = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")
NEVER: Answer = lambda _: []  # noqa: E731


def asked(server: Server) -> int:
    """Requests that the server's models were asked."""
    return len(server.service.requests)


class Server(Stack):
    """One server process: several over one store are several of these."""

    def __init__(self, config: AppConfig, answer: Answer | None = None, *, timing: Timing = QUICK) -> None:
        self.service = FakeService(config, answer)
        self.registry = CollectorRegistry()
        renderer = PromptRenderer.load(config, self.service.max_model_len)
        self.app = create_app(self.service, renderer, self.registry, timing=timing)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[openai.AsyncOpenAI]:
        """The server as Serve runs it, with its background work; gives a client."""
        async with self.app.router.lifespan_context(self.app):
            yield self.openai()

    @property
    def storage(self) -> BatchService:
        storage: BatchService = self.app.state.context.storage
        return storage

    def freeze(self) -> threading.Event:
        """Stop all that it does with the store, as a machine that hangs would, until the event is set."""
        gate = threading.Event()
        self.storage._offload._pool = _GatedPool(gate)
        return gate


class _GatedPool(ThreadPoolExecutor):
    def __init__(self, gate: threading.Event) -> None:
        super().__init__(16)
        self._gate = gate

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(lambda: (self._gate.wait(), call(*args, **kwargs))[1])


def request(custom_id: str, url: str = CHAT, **body: Any) -> str:
    """A line of a batch's input."""
    content = {"model": "up", "messages": [{"role": "user", "content": custom_id}], **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": content})


async def upload(client: openai.AsyncOpenAI, lines: Iterable[str]) -> str:
    """The id of a file with these lines."""
    data = "".join(line + "\n" for line in lines).encode()
    return (await client.files.create(file=("in.jsonl", data), purpose="batch")).id


async def create(client: openai.AsyncOpenAI, lines: Iterable[str], **fields: Any) -> Batch:
    """A batch of these lines."""
    file_id = await upload(client, lines)
    return await client.batches.create(
        **{"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
    )


async def ended(client: openai.AsyncOpenAI, batch_id: str, timeout_s: float = 20.0) -> Batch:
    """The batch once it has ended."""
    return await reached(client, batch_id, lambda batch: batch.status in ENDED, timeout_s)


async def reached(
    client: openai.AsyncOpenAI, batch_id: str, wanted: Callable[[Batch], bool], timeout_s: float = 20.0
) -> Batch:
    """The batch once it is as wanted."""
    deadline = time.monotonic() + timeout_s
    while not wanted(batch := await client.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline, batch
        await asyncio.sleep(0.02)
    return batch


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output."""
    assert file_id is not None
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]
