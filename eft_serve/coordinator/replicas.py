"""Which replicas of which models can be stepped, and how much of each one's KV budget is promised.

Knows endpoints by name and size only; reaching them is the backend's work, finding them the control plane's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from eft_serve.coordinator.request import Request, SequenceState
from eft_serve.types import Endpoint, ModelInfo

COOLDOWN_S = 1.0  # a replica that failed is left alone for so long


@dataclass(slots=True)
class Replica:
    """One replica of one model."""

    info: ModelInfo
    share: int  # coordinators that divide its KV budget among them
    retry_at: float = 0.0  # monotonic seconds; not stepped before
    blocks: int = 0  # promised to running requests, as of the last `count_blocks`

    @property
    def capacity_blocks(self) -> int:
        return max(1, self.info.kv_capacity_tokens // self.info.kv_block_size // self.share)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.info.kv_block_size)


@dataclass(slots=True)
class ReplicaTable:
    """Every replica known, and the freed sequences that each has still to be told of."""

    share: int = 1
    replicas: dict[str, Replica] = field(default_factory=dict)
    freed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def update(self, endpoints: Mapping[str, Endpoint]) -> set[str]:
        """Take the present set of endpoints; returns the replicas that are gone."""
        gone = set(self.replicas) - set(endpoints)
        for replica_id in gone:
            del self.replicas[replica_id]
            self.freed.pop(replica_id, None)
        for replica_id, endpoint in endpoints.items():
            if replica_id not in self.replicas:
                self.replicas[replica_id] = Replica(endpoint.info, self.share)
        return gone

    def of(self, model: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.info.model == model]

    def largest(self, model: str) -> tuple[int, int] | None:
        """(tokens of the longest sequence, tokens of KV budget) that any replica of this model can hold."""
        sizes = [
            (replica.info.max_model_len, replica.capacity_blocks * replica.info.kv_block_size)
            for replica in self.of(model)
        ]
        return max(sizes, key=min, default=None)

    def count_blocks(self, requests: Iterable[Request]) -> None:
        """Recount what running requests need once all their pending tokens are computed."""
        for replica in self.replicas.values():
            replica.blocks = 0
        for request in requests:
            for sequence in request.sequences.values():
                if sequence.replica_id is not None:
                    replica = self.replicas[sequence.replica_id]
                    replica.blocks += replica.blocks_for(request.num_tokens(sequence))

    def place(self, request: Request, now: float, *, within_budget: bool) -> set[str]:
        """Give each unplaced sequence the least loaded replica of its model, all or none.

        Returns the models that have no replica to offer; empty when the request is placed.
        """
        chosen = {
            sequence.model: self._least_loaded(
                sequence.model, request.num_tokens(sequence) if within_budget else 0, now
            )
            for sequence in request.sequences.values()
            if sequence.replica_id is None
        }
        missing = {model for model, replica_id in chosen.items() if replica_id is None}
        if not missing:
            for model, replica_id in chosen.items():
                self._assign(request, request.sequences[model], replica_id)
        return missing

    def _least_loaded(self, model: str, num_tokens: int, now: float) -> str | None:
        """The replica of this model with the largest part of its budget free, if it has room for so many tokens."""
        loads = [
            (replica.blocks / replica.capacity_blocks, replica_id)
            for replica_id, replica in self.replicas.items()
            if replica.info.model == model
            and replica.retry_at <= now
            and (num_tokens == 0 or replica.blocks + replica.blocks_for(num_tokens) <= replica.capacity_blocks)
        ]
        return min(loads)[1] if loads else None

    def _assign(self, request: Request, sequence: SequenceState, replica_id: str | None) -> None:
        assert replica_id is not None
        sequence.replica_id = replica_id
        replica = self.replicas[replica_id]
        replica.blocks += replica.blocks_for(request.num_tokens(sequence))

    def release(self, request: Request) -> None:
        """Its caches are no longer wanted; the engines learn it with the next step that they get."""
        for sequence in request.sequences.values():
            if sequence.replica_id in self.replicas:
                self.freed[sequence.replica_id].append(sequence.sequence_id)
            sequence.forget()

    def take_freed(self) -> dict[str, list[str]]:
        freed, self.freed = dict(self.freed), defaultdict(list)
        return freed
