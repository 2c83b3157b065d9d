"""What the coordinator needs of the models: one batched step on several replicas at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from eft_serve.types import StepBatch, StepResult


class LogitsBackend(Protocol):
    """All replicas of all models, as the decode loop sees them."""

    def fan_out(self, batches: Mapping[str, StepBatch], timeout_s: float) -> Mapping[str, StepResult]:
        """Send every replica its batch, wait for all of them or the deadline; keys are replica ids. Never raises."""
        ...
