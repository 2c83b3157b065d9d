"""Models that sleep instead of computing, and agree as often as they are told; the engine over them is the real one.

A row of logits depends on its token and position alone, so that all models, whatever their caches went through, tell
one story. It is an order of all tokens, from the one that comes to the least likely, so that models agree as well where
a grammar forbids the first ones. The base is sure of its order; the tuned model is less sure, and has the reverse one
now and then: so often in every ten positions as it is told to, at random places among them, or short runs would agree
by luck.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from eft_serve.bench.sleeping_engine import MAX_MODEL_LEN, model_info
from eft_serve.config import ModelConfig
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.engine import Engine
from eft_serve.types import ModelInfo

SURE, UNSURE = 20.0, 3.0  # the logits of one token above the next; the tuned model's first has a probability of .95
VOCAB_SIZE = 1000
PLACES = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))  # of tokens, in a circle
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
            logits = torch.cat([self._logits(row) for row in batch.rows])
        time.sleep(max(0.0, self.latency_s - (time.perf_counter() - started)))
        return logits

    def _logits(self, row: BatchRow) -> Tensor:
        first = len(row.token_ids) - row.num_logits
        after = [self._after(token, row.position + first + i) for i, token in enumerate(row.token_ids[first:])]
        return torch.stack(after) if after else torch.zeros(0, VOCAB_SIZE)

    def _after(self, token: int, position: int) -> Tensor:
        """[VOCAB_SIZE], the logits behind this token."""
        ranks = (PLACES - _dice(f"{token} {position}") % VOCAB_SIZE) % VOCAB_SIZE
        if self.role == "base":
            return -SURE * ranks
        return -UNSURE * (VOCAB_SIZE - 1 - ranks if self._disagrees(position) else ranks)

    def _disagrees(self, position: int) -> bool:
        number, place = divmod(position, WINDOW)
        places = sorted(range(WINDOW), key=lambda i: _dice(f"window {number} {i}"))
        return place in places[: round(WINDOW * (1 - self.acceptance))]

    def close(self) -> None:
        """Keeps nothing, so frees nothing."""


def _dice(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def build(role: str, latency_s: float, acceptance: float, checkpoint: Path) -> tuple[Engine, ModelInfo]:
    """An engine over such a model, for a process of its own.

    Args:
        role: base, tuned, or another.
        latency_s: of a forward.
        acceptance: how often the tuned model agrees, in tenths.
        checkpoint: a directory with a `tokenizer.json`, for grammars.
    """
    info = model_info(role, VOCAB_SIZE)
    config = ModelConfig(path=str(checkpoint), max_model_len=MAX_MODEL_LEN)
    return Engine(info, SimulatedGroup(role, latency_s, acceptance), config, VOCAB_SIZE), info  # type: ignore[arg-type]
