"""A backend of deterministic toy models that keeps the step contract, misbehaving only where a test asks it to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from eft_serve.numerics.sampling import sample
from eft_serve.types import Endpoint, ModelInfo, SequenceStep, StepBatch, StepOutput, StepResult

VOCAB_SIZE = 61
EOS = 60


def toy_logits(model: str, token_ids: Sequence[int], adapter: str | None = None) -> Tensor:
    """Next-token logits [VOCAB_SIZE] that depend on every token; what depends on the model is the lesser part."""
    logits = 3 * _noise(f"{list(token_ids)}") + _noise(f"{model}+{adapter}:{list(token_ids)}")
    logits[EOS] -= 3.0
    return logits


def _noise(key: str) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


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


Root = tuple[str, str, str | None]  # replica, salt, adapter


@dataclass
class ToyBackend:
    """Holds every sequence's tokens by replica, and checks that nobody steps what it may not."""

    endpoints: Mapping[str, Endpoint]
    connected: Mapping[str, Endpoint] = field(default_factory=dict)
    sequences: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # replica → sequence → tokens
    cached: dict[Root, set[tuple[int, ...]]] = field(default_factory=dict)  # → beginnings
    salts: dict[str, str | None] = field(default_factory=dict)  # by sequence
    adapters: dict[str, str | None] = field(default_factory=dict)  # by sequence
    num_computed_tokens: int = 0  # tokens, all models together
    max_computed: int = 0  # the most that one replica computed in one step
    dead: set[str] = field(default_factory=set)
    full: set[str] = field(default_factory=set)  # engines that have no room for anything more
    disturb: Callable[[ToyBackend], None] = lambda backend: None  # called before each fan-out
    batches: list[Mapping[str, StepBatch]] = field(default_factory=list)
    _finished: dict[str, StepResult] = field(default_factory=dict)

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.connected = endpoints

    def close(self) -> None:
        self.connected = {}

    def fan_out(
        self, batches: Mapping[str, StepBatch], timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> Mapping[str, StepResult]:
        if meanwhile is not None:
            meanwhile()
        self.disturb(self)
        self.batches.append(batches)
        return {replica_id: self._answer(replica_id, batch) for replica_id, batch in batches.items()}

    def begin(self, batches: Mapping[str, StepBatch], timeout_s: float) -> None:
        self._finished |= self.fan_out(batches, timeout_s)

    def finished(self) -> Mapping[str, StepResult]:
        finished, self._finished = self._finished, {}
        return finished

    def _answer(self, replica_id: str, batch: StepBatch) -> StepResult:
        if replica_id in self.dead or replica_id not in self.connected:
            return StepResult(failure="dead")
        sequences = self.sequences.setdefault(replica_id, {})
        for sequence_id in batch.freed:
            sequences.pop(sequence_id, None)
        if replica_id in self.full:
            return StepResult(outputs=[StepOutput(step.sequence_id, num_computed_tokens=0) for step in batch.steps])
        before = self.num_computed_tokens
        outputs = [self._step(replica_id, sequences, step) for step in batch.steps]
        self.max_computed = max(self.max_computed, self.num_computed_tokens - before)
        capacity = self.endpoints[replica_id].info.kv_capacity_tokens
        block = self.endpoints[replica_id].info.kv_block_size
        used = sum(-(-len(tokens) // block) * block for tokens in sequences.values())
        assert used <= capacity, f"{replica_id} holds {used} of {capacity} tokens"
        return StepResult(outputs=outputs)

    def _step(self, replica_id: str, sequences: dict[str, list[int]], step: SequenceStep) -> StepOutput:
        info = self.endpoints[replica_id].info
        tokens, new = sequences.get(step.sequence_id, []), step.token_ids
        if len(tokens) < step.position:
            return StepOutput(step.sequence_id, num_computed_tokens=len(tokens))
        assert step.position + len(new) <= info.max_model_len
        assert (step.salt, step.adapter) == (None, None) or step.position == 0
        if step.position == 0:
            self.salts[step.sequence_id] = step.salt
            self.adapters[step.sequence_id] = step.adapter
        adapter = self.adapters[step.sequence_id]
        found = self._find(replica_id, step, info.kv_block_size)
        computed = new[found:] if step.max_computed is None else new[found : found + step.max_computed]
        self.num_computed_tokens += len(computed)
        tokens = sequences[step.sequence_id] = tokens[: step.position] + new[: found + len(computed)]
        if salt := self.salts[step.sequence_id]:
            ends = range(info.kv_block_size, len(tokens) + 1, info.kv_block_size)
            self.cached.setdefault((replica_id, salt, adapter), set()).update(tuple(tokens[:end]) for end in ends)
        if found + len(computed) < len(new):
            return StepOutput(step.sequence_id, num_computed_tokens=len(tokens), num_cached_tokens=found)
        ends = range(len(tokens) - step.num_logits + 1, len(tokens) + 1)
        rows = [toy_logits(info.model, tokens[:end], adapter) for end in ends]
        drafted = self._draft(info, sequences, step, rows) if step.draft is not None else []
        return StepOutput(
            step.sequence_id,
            logits=torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE),
            drafted=[token_id for token_id, _ in drafted],
            confidences=[confidence for _, confidence in drafted],
            num_cached_tokens=found,
        )

    def _draft(
        self, info: ModelInfo, sequences: dict[str, list[int]], step: SequenceStep, rows: list[Tensor]
    ) -> list[tuple[int, float]]:
        """As many as asked for, as are likely enough and as the budget has room for; each with its probability."""
        draft, tokens, drafted = step.draft, sequences[step.sequence_id], list[tuple[int, float]]()
        assert draft is not None
        assert rows
        while True:
            position = draft.position + len(drafted)
            token_id = int(sample(rows[-1][None, : draft.num_ids], [draft.sampling], [position]))
            drafted.append((token_id, float(rows[-1][: draft.num_ids].softmax(dim=-1)[token_id])))
            used = sum(-(-len(t) // info.kv_block_size) * info.kv_block_size for t in sequences.values())
            has_room = used + info.kv_block_size <= info.kv_capacity_tokens and len(tokens) < info.max_model_len
            is_sure = draft.confidence * prod(c for _, c in drafted) >= draft.min_confidence
            if len(drafted) == draft.num_tokens or not has_room or not is_sure:
                return drafted
            tokens.append(token_id)
            self.num_computed_tokens += 1
            rows.append(toy_logits(info.model, tokens, self.adapters[step.sequence_id]))

    def _find(self, replica_id: str, step: SequenceStep, block_size: int) -> int:
        """Tokens of a first step that this replica has cached; what logits are wanted of is computed."""
        most = len(step.token_ids) - max(1, step.num_logits)
        beginnings = self.cached.get((replica_id, step.salt, step.adapter), ()) if step.salt is not None else ()
        ends = range(0, most + 1, block_size)
        return max((end for end in ends if tuple(step.token_ids[:end]) in beginnings), default=0)
