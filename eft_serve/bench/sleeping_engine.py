"""An engine that only sleeps: the step contract with a given latency and width of logits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from eft_serve.types import ModelInfo, SequenceStep, StepOutput

MAX_MODEL_LEN = 100_000


def model_info(model: str, vocab_size: int) -> ModelInfo:
    """Of a model that is none."""
    return ModelInfo(
        model=model,
        vocab_size=vocab_size,
        max_model_len=MAX_MODEL_LEN,
        kv_capacity_tokens=100 * MAX_MODEL_LEN,
        kv_block_size=16,
        dtype="float32",
        tensor_parallel=1,
        attention="none",
    )


class SleepingEngine:
    """Holds every sequence, computes nothing; is not asked to draft token."""

    def __init__(self, latency_s: float, vocab_size: int) -> None:
        self.latency_s = latency_s
        self.row = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(vocab_size))

    @classmethod
    def build(cls, model: str, latency_s: float, vocab_size: int) -> tuple[SleepingEngine, ModelInfo]:
        """For a process of its own."""
        return cls(latency_s, vocab_size), model_info(model, vocab_size)

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]:
        if steps and self.latency_s:
            time.sleep(self.latency_s)
        return [self._answer(step) for step in steps]

    def _answer(self, step: SequenceStep) -> StepOutput:
        if step.max_computed is not None and step.max_computed < len(step.token_ids):
            return StepOutput(step.sequence_id, num_computed_tokens=step.position + step.max_computed)
        return StepOutput(step.sequence_id, logits=self.row.expand(step.num_logits, -1))

    def free(self, sequence_ids: Iterable[str]) -> None:
        """Keeps nothing, so frees nothing."""

    def expire(self) -> None:
        """Keeps nothing, so frees nothing."""
