"""A backend of deterministic toy models that keeps the step contract, misbehaving only where a test asks it to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eft_serve.types import Endpoint, ModelInfo, SequenceStep, StepBatch, StepOutput, StepResult

VOCAB_SIZE = 61
EOS = 60


def toy_logits(model: str, token_ids: Sequence[int]) -> Tensor:
    """Next-token logits [VOCAB_SIZE] that depend on the model and on every token."""
    digest = hashlib.sha256(f"{model}:{list(token_ids)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    logits = torch.randn(VOCAB_SIZE, generator=generator) * 3
    logits[EOS] -= 3.0
    return logits


def endpoint(model: str, replica_id: str, *, kv_tokens: int = 4096, max_len: int = 512, block: int = 4) -> Endpoint:
    info = ModelInfo(
        model=model,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_len,
        kv_capacity_tokens=kv_tokens,
        kv_block_size=block,
        dtype="float32",
        tensor_parallel=1,
        attention="toy",
    )
    return Endpoint(replica_id=replica_id, address="tcp://127.0.0.1:1", public_key=b"k" * 40, info=info)


@dataclass
class ToyBackend:
    """Holds every sequence's tokens by replica, and checks that nobody steps what it may not."""

    endpoints: Mapping[str, Endpoint]
    connected: Mapping[str, Endpoint] = field(default_factory=dict)
    held: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # replica → sequence → tokens
    dead: set[str] = field(default_factory=set)
    full: set[str] = field(default_factory=set)  # engines that have no room for anything more
    disturb: Callable[[ToyBackend], None] = lambda backend: None  # called before each fan-out
    batches: list[Mapping[str, StepBatch]] = field(default_factory=list)

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.connected = endpoints

    def close(self) -> None:
        self.connected = {}

    def fan_out(self, batches: Mapping[str, StepBatch], timeout_s: float) -> Mapping[str, StepResult]:
        self.disturb(self)
        self.batches.append(batches)
        return {replica_id: self._answer(replica_id, batch) for replica_id, batch in batches.items()}

    def _answer(self, replica_id: str, batch: StepBatch) -> StepResult:
        if replica_id in self.dead or replica_id not in self.connected:
            return StepResult(failure="dead")
        held = self.held.setdefault(replica_id, {})
        for sequence_id in batch.freed:
            held.pop(sequence_id, None)
        if replica_id in self.full:
            return StepResult(outputs=[StepOutput(step.sequence_id, held=0) for step in batch.steps])
        outputs = [self._step(self.endpoints[replica_id].info, held, step) for step in batch.steps]
        capacity = self.endpoints[replica_id].info.kv_capacity_tokens
        block = self.endpoints[replica_id].info.kv_block_size
        used = sum(-(-len(tokens) // block) * block for tokens in held.values())
        assert used <= capacity, f"{replica_id} holds {used} of {capacity} tokens"
        return StepResult(outputs=outputs)

    def _step(self, info: ModelInfo, held: dict[str, list[int]], step: SequenceStep) -> StepOutput:
        tokens = held.get(step.sequence_id, [])
        if len(tokens) < step.position:
            return StepOutput(step.sequence_id, held=len(tokens))
        tokens = tokens[: step.position] + list(step.token_ids)
        assert len(tokens) <= info.max_model_len
        held[step.sequence_id] = tokens
        rows = [toy_logits(info.model, tokens[: len(tokens) - back]) for back in reversed(range(step.num_logits))]
        return StepOutput(step.sequence_id, logits=torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE))
