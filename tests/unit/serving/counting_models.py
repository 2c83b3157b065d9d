"""Models whose next token is one more than the last, and what a coordinator of them needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizer_files import byte_level

from eft_serve.types import (
    Combination,
    Endpoint,
    ModelInfo,
    StepBatch,
    StepOutput,
    StepResult,
    Term,
)

VOCAB_SIZE = 8


LENGTH = 100_000


CONFIG: dict[str, Any] = {
    "models": {"base": {"path": "none"}, "tuned": {"path": "none"}, "law": {"model": "base", "adapter": "none"}},
}


EFT = Combination((Term("base", "base", 0.5), Term("tuned", "tuned", 0.5, weight=1.0)))


@dataclass(frozen=True)
class DigitVocabulary:
    """A token is its digit."""

    num_tokens: int = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def tokenizer_json(self) -> str:
        return byte_level([str(token_id) for token_id in range(VOCAB_SIZE)])

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(str, token_ids))


@dataclass
class CountingBackend:
    """Every model's next token is one more than the last; steps wait while the gate is shut."""

    gate: threading.Event = field(default_factory=threading.Event)
    stepped: set[str] = field(default_factory=set)
    freed: set[str] = field(default_factory=set)
    _finished: dict[str, StepResult] = field(default_factory=dict)

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.gate.set()

    def close(self) -> None:
        pass

    def fan_out(
        self, batches: Mapping[str, StepBatch], timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> Mapping[str, StepResult]:
        if meanwhile is not None:
            meanwhile()
        assert self.gate.wait(timeout_s)
        for batch in batches.values():
            self.freed |= set(batch.freed)
            self.stepped |= {step.sequence_id for step in batch.steps}
        one_hot = torch.eye(VOCAB_SIZE)
        return {
            replica_id: StepResult(
                outputs=[
                    StepOutput(s.sequence_id, logits=10 * one_hot[(s.token_ids[-1:] * s.num_logits,)].roll(1, dims=1))
                    for s in batch.steps
                ]
            )
            for replica_id, batch in batches.items()
        }

    def begin(self, batches: Mapping[str, StepBatch], timeout_s: float) -> None:
        self._finished |= self.fan_out(batches, timeout_s)

    def finished(self) -> Mapping[str, StepResult]:
        finished, self._finished = self._finished, {}
        return finished

    @property
    def sequences(self) -> set[str]:
        return {name for name in self.stepped - self.freed if not name.startswith("probe/")}


def endpoint(model: str) -> Endpoint:
    info = ModelInfo(
        model=model,
        vocab_size=VOCAB_SIZE,
        max_model_len=LENGTH,
        kv_capacity_tokens=10 * LENGTH,
        kv_block_size=16,
        dtype="float32",
        tensor_parallel=1,
        attention="none",
    )
    return Endpoint(replica_id=model, address="tcp://127.0.0.1:1", public_key=b"k" * 40, info=info)
