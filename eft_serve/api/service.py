"""What the HTTP surface needs of the rest: a protocol, so that all of it runs in a unit test on a fake."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from eft_serve.config import AppConfig
from eft_serve.types import Delta, GenerationRequest


class Service(Protocol):
    """The models and coordinators behind the API, as one process sees them; used by one event loop."""

    @property
    def config(self) -> AppConfig:
        """The application that is served."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Run a request; the last delta carries a finish reason.

        Closing the generator, or cancelling the task that waits in it, aborts the request everywhere. An error is
        either raised or arrives as a delta with a `failure`.
        """
        ...

    async def check_ready(self) -> None:
        """Return when every model answered a step; raises `UnavailableError` that names what is missing."""
        ...

    async def metrics(self) -> bytes:
        """Prometheus text of the other processes; the API adds its own registry to it."""
        ...

    def max_model_len(self, model: str) -> int:
        """Tokens that one sequence of this model may hold; raises `UnavailableError` until that is known."""
        ...
