"""What the coordinator needs of the models: one batched step on several replicas at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from eft_serve.types import Endpoint, StepBatch, StepResult


class LogitsBackend(Protocol):
    """All replicas of all models, as the decode loop sees them; used by one thread."""

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        """All replicas that there are now, by replica id: connect the new ones, drop the others."""
        ...

    def close(self) -> None:
        """Let go of all of them."""
        ...

    def fan_out(
        self, batches: Mapping[str, StepBatch], timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> Mapping[str, StepResult]:
        """Send every replica its batch, wait for all of them or the deadline; keys are replica ids. Never raises.

        What is to be done `meanwhile` is done once, when all is sent.
        """
        ...

    def begin(self, batches: Mapping[str, StepBatch], timeout_s: float) -> None:
        """Send replicas their batches and wait for none of them; those of `fan_out` are others. Never raises."""
        ...

    def finished(self) -> Mapping[str, StepResult]:
        """What became of the batches that were begun: each once, when it is answered or its deadline has passed."""
        ...
