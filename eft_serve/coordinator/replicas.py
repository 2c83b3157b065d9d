"""Which replicas of which models can be stepped, and how much of each one's KV budget is reserved.

Knows endpoints by name and size only; the backend connects to them, the control plane finds them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eft_serve.coordinator.request import Request, SequenceState
from eft_serve.errors import ContextLengthError
from eft_serve.types import Endpoint, ModelInfo

FIRST_RETRY_S = 1.0  # before a failed replica is probed; twice as long after each further failure
LONGEST_RETRY_S = 2.0  # a probe delays nobody, and a replica that is back must not wait for the next one


@dataclass(slots=True)
class Replica:
    """One replica of one model."""

    info: ModelInfo
    share: int  # coordinators that divide its KV budget among them
    healthy: bool = False  # it has answered a step and not failed since
    num_failures: int = 0  # since its last answer
    retry_at: float = 0.0  # monotonic seconds; no probe before
    blocks: int = 0  # reserved for running requests, as of the last `count_blocks`

    def succeed(self) -> None:
        self.healthy, self.num_failures = True, 0

    def fail(self, now: float) -> None:
        """Mark it unhealthy; it is probed again after a back-off."""
        self.healthy = False
        self.retry_at = now + min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**self.num_failures)
        self.num_failures += 1

    @property
    def capacity_blocks(self) -> int:
        return max(1, self.info.kv_capacity_tokens // self.info.kv_block_size // self.share)

    @property
    def longest_sequence(self) -> int:
        """Tokens that one sequence may have here."""
        return min(self.info.max_model_len, self.capacity_blocks * self.info.kv_block_size)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.info.kv_block_size)

    def has_room(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` fits beside `num_blocks` reserved blocks."""
        fits = num_blocks + self.blocks_for(num_tokens) <= self.capacity_blocks
        return fits and num_tokens <= self.info.max_model_len

    def add(self, num_tokens: int) -> None:
        """Reserve room for one more sequence."""
        self.blocks += self.blocks_for(num_tokens)


@dataclass(slots=True)
class ReplicaTable:
    """Every known replica, and the freed sequences not yet sent to each."""

    share: int = 1
    replicas: dict[str, Replica] = field(default_factory=dict)
    freed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def update(self, endpoints: Mapping[str, Endpoint]) -> set[str]:
        """Take the current set of endpoints; returns the replicas that are gone."""
        gone = set(self.replicas) - set(endpoints)
        for replica_id in gone:
            del self.replicas[replica_id]
            self.freed.pop(replica_id, None)
        for replica_id, endpoint in endpoints.items():
            if replica_id not in self.replicas:
                self.replicas[replica_id] = Replica(endpoint.info, self.share)
        return gone

    def due(self, now: float) -> list[str]:
        """Replicas that are due for a probe."""
        return [r for r, replica in self.replicas.items() if not replica.healthy and replica.retry_at <= now]

    @property
    def healthy_models(self) -> set[str]:
        return {replica.info.model for replica in list(self.replicas.values()) if replica.healthy}

    def of(self, model: str) -> list[Replica]:
        """Every replica of this model, healthy or not."""
        return [replica for replica in self.replicas.values() if replica.info.model == model]

    def healthy(self) -> dict[str, list[Replica]]:
        """The healthy replicas, by model."""
        found: dict[str, list[Replica]] = defaultdict(list)
        for replica in self.replicas.values():
            if replica.healthy:
                found[replica.info.model].append(replica)
        return found

    def context_left(self, request: Request) -> int:
        """Tokens that the shortest context leaves for the output.

        Raises:
            ContextLengthError: no replica of some model could ever hold the prompt and a token.
        """
        left = request.max_tokens
        for model in sorted(request.models):
            replicas = self.of(model)
            if not replicas:
                continue  # a replica may come back; the request waits for it
            prompts = [len(sequence.prompt_token_ids) for sequence in request.sequences if sequence.model == model]
            left = longest_output(replicas, prompts, left)
            if not left:
                longest = max(replica.longest_sequence for replica in replicas)
                has = " and ".join(f"{num_tokens}" for num_tokens in prompts)
                whose = "prompt has" if len(prompts) == 1 else "prompts that it reads side by side have"
                raise ContextLengthError(
                    f"model {model} holds {longest} tokens and the {whose} {has}; shorten the prompt", param="prompt"
                )
        return left

    def count_blocks(self, requests: Iterable[Request]) -> None:
        """Recount the blocks of running requests, all pending tokens and draft tokens included."""
        for replica in self.replicas.values():
            replica.blocks = 0
        for request in requests:
            for sequence in request.sequences:
                if sequence.replica_id is not None:
                    self.replicas[sequence.replica_id].add(request.num_reserved(sequence))

    def place(self, request: Request, *, within_budget: bool) -> set[str]:
        """Assign each unplaced sequence a replica of its model, see `assign`; all of them or none.

        Returns the models without a suitable replica; empty when the request is placed.
        """
        unplaced: dict[str, list[SequenceState]] = defaultdict(list)
        for sequence in request.sequences:
            if sequence.replica_id is None:
                unplaced[sequence.model].append(sequence)
        chosen: dict[str, list[tuple[SequenceState, str]]] = {}
        for model, sequences in unplaced.items():
            ids = [r for r, replica in self.replicas.items() if replica.healthy and replica.info.model == model]
            replicas = [self.replicas[replica_id] for replica_id in ids]
            used = [replica.blocks for replica in replicas] if within_budget else None
            if (found := assign(replicas, [request.num_tokens(s) for s in sequences], used)) is not None:
                chosen[model] = [(s, ids[index]) for s, index in zip(sequences, found, strict=True)]
        if missing := unplaced.keys() - chosen.keys():
            return missing
        for sequence, replica_id in (pair for pairs in chosen.values() for pair in pairs):
            sequence.replica_id = replica_id
            self.replicas[replica_id].add(request.num_tokens(sequence))
        return set()

    def release(self, request: Request) -> None:
        """Drop all caches of a request."""
        for sequence in request.sequences:
            self.drop(sequence)

    def drop(self, sequence: SequenceState) -> None:
        """Drop this sequence's cache; the engine frees it with its next step."""
        if sequence.replica_id in self.replicas:
            self.freed[sequence.replica_id].append(sequence.sequence_id)
        sequence.forget()

    def take_freed(self) -> dict[str, list[str]]:
        """Freed sequences to send to the healthy replicas; those of the others wait until they answer again."""
        sent = {r: ids for r, ids in self.freed.items() if r in self.replicas and self.replicas[r].healthy}
        for replica_id in sent:
            del self.freed[replica_id]
        return sent

    def give_back_freed(self, replica_id: str, sequence_ids: Sequence[str]) -> None:
        """They could not be sent; send them again later."""
        if replica_id in self.replicas:
            self.freed[replica_id] = [*sequence_ids, *self.freed[replica_id]]


def could_hold(replicas: Mapping[str, Sequence[Replica]], request: Request) -> bool:
    """Whether these replicas, by model, could hold all sequences of the request if they were empty."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for sequence in request.sequences:
        lengths[sequence.model].append(request.num_tokens(sequence))
    return all(_fit(replicas.get(model, ()), found) for model, found in lengths.items())


def longest_output(replicas: Sequence[Replica], prompts: Sequence[int], wanted: int) -> int:
    """Output tokens, up to `wanted`, for which sequences with these prompt lengths all fit at once."""
    return bisect_left(range(1, wanted + 1), True, key=lambda n: not _fit(replicas, [p + n for p in prompts]))


def _fit(replicas: Sequence[Replica], lengths: Sequence[int]) -> bool:
    """Whether sequences of these lengths all fit at once if the replicas were empty."""
    return assign(replicas, lengths, [0] * len(replicas)) is not None


def assign(replicas: Sequence[Replica], lengths: Sequence[int], used: Sequence[int] | None) -> list[int] | None:
    """A replica's index for each sequence: the longest first, to the replica with most of its budget free.

    Args:
        replicas: of one model.
        lengths: tokens of each sequence.
        used: blocks already reserved on each replica; None to place by load alone, regardless of budget.

    Returns:
        None when a sequence fits on no replica.
    """
    blocks = [replica.blocks for replica in replicas] if used is None else list(used)
    chosen = [-1] * len(lengths)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        loads = [
            (blocks[index] / replica.capacity_blocks, index)
            for index, replica in enumerate(replicas)
            if used is None or replica.has_room(blocks[index], lengths[place])
        ]
        if not loads:
            return None
        chosen[place] = index = min(loads)[1]
        blocks[index] += replicas[index].blocks_for(lengths[place])
    return chosen
