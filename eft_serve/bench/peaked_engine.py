"""An engine that answers at once with logits shaped like a language model's: a few likely tokens above a wide bulk.

Every model has the same few rows, each with noise of its own: models agree about what is likely, and nearly about the
rest. The shape is that of base − reference + tuned at T = 1: the head holds `HEAD_MASS`, falling like a power of the
rank, and the bulk, normal, 10 to 20 below the peak, holds what is left. Nothing is generated while steps are measured.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eft_serve.bench.sleeping_engine import model_info
from eft_serve.types import ModelInfo, SequenceStep, StepOutput

NUM_ROWS = 64
HEAD_SIZE, HEAD_MASS, HEAD_EXPONENT = 48, 0.95, 1.5
HEAD_NOISE = 0.15  # of each model
BULK_DEVIATION, BULK_NOISE = 2.4, 0.7  # of all models alike, and of each; 2.5 together
NUM_MODELS = 3  # that are added or subtracted, each with its noise


def peaked_logits(model: str, vocab_size: int) -> Tensor:
    """[NUM_ROWS, vocab_size] float32; the same for the same arguments."""
    shared = torch.Generator().manual_seed(vocab_size)
    own = torch.Generator().manual_seed(zlib.crc32(model.encode()))
    logits = torch.randn(NUM_ROWS, vocab_size, generator=shared).mul_(BULK_DEVIATION)
    logits += torch.randn(NUM_ROWS, vocab_size, generator=own).mul_(BULK_NOISE)
    head = torch.stack([torch.randperm(vocab_size, generator=shared)[:HEAD_SIZE] for _ in range(NUM_ROWS)])
    noise = torch.randn(NUM_ROWS, HEAD_SIZE, generator=own).mul_(HEAD_NOISE)
    return logits.scatter_(1, head, _head_logits(vocab_size) + noise)


def _head_logits(vocab_size: int) -> Tensor:
    """[HEAD_SIZE], falling, above a bulk whose mean is 0."""
    variance = BULK_DEVIATION**2 + NUM_MODELS * BULK_NOISE**2
    log_bulk = math.log(vocab_size) + variance / 2  # of the sum of exp over a normal bulk
    falling = -HEAD_EXPONENT * torch.arange(1, HEAD_SIZE + 1).log()
    return falling.log_softmax(0) + math.log(HEAD_MASS / (1 - HEAD_MASS)) + log_bulk


class PeakedEngine:
    """Holds every sequence, computes nothing; all sequences of a request find the same row at the same position."""

    def __init__(self, logits: Tensor) -> None:
        self._rows: tuple[Tensor, ...] = logits.split(1)

    @classmethod
    def build(cls, model: str, vocab_size: int) -> tuple[PeakedEngine, ModelInfo]:
        """For a process of its own."""
        return cls(peaked_logits(model, vocab_size)), model_info(model, vocab_size)

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]:
        return [StepOutput(step.sequence_id, logits=self._row(step).expand(step.num_logits, -1)) for step in steps]

    def _row(self, step: SequenceStep) -> Tensor:
        request_id = step.sequence_id.partition("/")[0]
        return self._rows[(zlib.crc32(request_id.encode()) + step.position) % len(self._rows)]

    def free(self, sequence_ids: Iterable[str]) -> None:
        """Keeps nothing, so frees nothing."""

    def expire(self) -> None:
        """Keeps nothing, so frees nothing."""
