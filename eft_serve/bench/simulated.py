"""Models that sleep instead of computing, and agree as often as they are told; the engine over them is the real one.

A row of logits depends on its token and position alone, so that all models, whatever their caches went through, tell
one story. The base is sure of what comes; the tuned model is less sure, and says something else now and then: so often
in every ten positions as it is told to, at random places among them, or short runs would agree by luck.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eft_serve.bench.sleeping_engine import MAX_MODEL_LEN, model_info
from eft_serve.config import ModelConfig
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.engine import Engine
from eft_serve.types import ModelInfo

SURE, UNSURE = 20.0, 10.0
VOCAB_SIZE = 1000
WINDOW = 10


@dataclass
class SimulatedGroup:
    """In the place of a model's ranks: sleeps `latency_s` a forward, however many tokens it has."""

    role: str  # base, tuned, or another, which is indifferent
    latency_s: float
    acceptance: float  # how often the tuned model says what the base says, in tenths
    workers: tuple[()] = field(default=())

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [batch.num_logits, VOCAB_SIZE]."""
        started = time.perf_counter()
        logits = torch.zeros(batch.num_logits, VOCAB_SIZE)
        if self.role in ("base", "tuned"):
            tokens = [token for row in batch.rows for token in self._next_tokens(row)]
            logits[torch.arange(len(tokens)), tokens] = SURE if self.role == "base" else UNSURE
        time.sleep(max(0.0, self.latency_s - (time.perf_counter() - started)))
        return logits

    def _next_tokens(self, row: BatchRow) -> list[int]:
        first = len(row.token_ids) - row.num_logits
        return [self._next(token, row.position + first + i) for i, token in enumerate(row.token_ids[first:])]

    def _next(self, token: int, position: int) -> int:
        agreed = _dice(f"{token} {position}") % VOCAB_SIZE
        return (agreed + 1) % VOCAB_SIZE if self.role == "tuned" and self._disagrees(position) else agreed

    def _disagrees(self, position: int) -> bool:
        number, place = divmod(position, WINDOW)
        places = sorted(range(WINDOW), key=lambda i: _dice(f"window {number} {i}"))
        return place in places[: round(WINDOW * (1 - self.acceptance))]

    def close(self) -> None:
        """Keeps nothing, so frees nothing."""


def _dice(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def build(role: str, latency_s: float, acceptance: float) -> tuple[Engine, ModelInfo]:
    """An engine over such a model, for a process of its own."""
    info = model_info(role, VOCAB_SIZE)
    config = ModelConfig(path="simulated", max_model_len=MAX_MODEL_LEN)
    return Engine(info, SimulatedGroup(role, latency_s, acceptance), config, VOCAB_SIZE), info  # type: ignore[arg-type]
