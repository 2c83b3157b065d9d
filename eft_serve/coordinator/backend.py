"""What the coordinator needs of the models: one batched step on several replicas at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from eft_serve.types import Endpoint, StepBatch, StepResult


class LogitsBackend(Protocol):
    """All replicas of all models, as the decode loop sees them; used by one thread."""

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        """All current replicas, by replica id: connect the new ones, disconnect the others."""
        ...

    def close(self) -> None:
        """Disconnect from all replicas."""
        ...

    def fan_out(
        self, batches: Mapping[str, StepBatch], timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> Mapping[str, StepResult]:
        """Send every replica its batch, wait for all answers or the deadline; keys are replica ids. Never raises.

        `meanwhile` is called once, after everything is sent.
        """
        ...

    def begin(self, batches: Mapping[str, StepBatch], timeout_s: float) -> None:
        """Send replicas their batches without waiting for answers; `fan_out` steps other replicas. Never raises."""
        ...

    def finished(self) -> Mapping[str, StepResult]:
        """Results of batches sent by `begin`: each once, when it is answered or its deadline has passed."""
        ...
