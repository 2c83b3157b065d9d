"""Which replicas of which models can be stepped, and how much of each one's KV budget is promised.

Knows endpoints by name and size only; reaching them is the backend's work, finding them the control plane's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eft_serve.coordinator.request import Request, SequenceState
from eft_serve.errors import ContextLengthError
from eft_serve.types import Endpoint, ModelInfo

FIRST_RETRY_S = 1.0  # a replica that failed is left alone for so long; twice as long after each further failure
LONGEST_RETRY_S = 60.0


@dataclass(slots=True)
class Replica:
    """One replica of one model."""

    info: ModelInfo
    share: int  # coordinators that divide its KV budget among them
    healthy: bool = False  # it has answered a step, and none has failed since
    num_failures: int = 0  # since it last answered
    retry_at: float = 0.0  # monotonic seconds; not tried before
    blocks: int = 0  # promised to running requests, as of the last `count_blocks`

    def succeed(self) -> None:
        self.healthy, self.num_failures = True, 0

    def fail(self, now: float) -> None:
        """It has to prove itself again, and not at once: whoever waits for it holds up everybody."""
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
        """Whether a sequence of so many tokens fits beside so many promised blocks."""
        fits = num_blocks + self.blocks_for(num_tokens) <= self.capacity_blocks
        return fits and num_tokens <= self.info.max_model_len

    def add(self, num_tokens: int) -> None:
        """Promise one more sequence room."""
        self.blocks += self.blocks_for(num_tokens)


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

    def due(self, now: float) -> list[str]:
        """Replicas that have to be probed now."""
        return [r for r, replica in self.replicas.items() if not replica.healthy and replica.retry_at <= now]

    @property
    def healthy_models(self) -> set[str]:
        return {replica.info.model for replica in list(self.replicas.values()) if replica.healthy}

    def of(self, model: str) -> list[Replica]:
        """Every replica of this model, whether it answers now or not."""
        return [replica for replica in self.replicas.values() if replica.info.model == model]

    def healthy(self) -> dict[str, list[Replica]]:
        """Those that answer now, by model."""
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
                continue  # one may come back; the request waits for it
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
        """Recount what running requests need once all their pending tokens and draft tokens are computed."""
        for replica in self.replicas.values():
            replica.blocks = 0
        for request in requests:
            for sequence in request.sequences:
                if sequence.replica_id is not None:
                    self.replicas[sequence.replica_id].add(request.num_reserved(sequence))

    def place(self, request: Request, *, within_budget: bool) -> set[str]:
        """Give each unplaced sequence a replica of its model, see `assign`; all of them or none.

        Returns the models that have no replica to offer; empty when the request is placed.
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
        """Its caches are no longer wanted."""
        for sequence in request.sequences:
            self.drop(sequence)

    def drop(self, sequence: SequenceState) -> None:
        """Forget this cache; its engine learns it with the next step that it gets."""
        if sequence.replica_id in self.replicas:
            self.freed[sequence.replica_id].append(sequence.sequence_id)
        sequence.forget()

    def take_freed(self) -> dict[str, list[str]]:
        """What the replicas that answer have to be told; the others are told when they answer again."""
        told = {r: ids for r, ids in self.freed.items() if r in self.replicas and self.replicas[r].healthy}
        for replica_id in told:
            del self.freed[replica_id]
        return told

    def give_back_freed(self, replica_id: str, sequence_ids: Sequence[str]) -> None:
        """It could not be told."""
        if replica_id in self.replicas:
            self.freed[replica_id] = [*sequence_ids, *self.freed[replica_id]]


def could_hold(replicas: Mapping[str, Sequence[Replica]], request: Request) -> bool:
    """Whether these replicas, by model, could ever hold all its sequences, were they empty."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for sequence in request.sequences:
        lengths[sequence.model].append(request.num_tokens(sequence))
    return all(_fit(replicas.get(model, ()), found) for model, found in lengths.items())


def longest_output(replicas: Sequence[Replica], prompts: Sequence[int], wanted: int) -> int:
    """Tokens, at most as many as are wanted, that sequences with so many prompt tokens each can grow by together."""
    return bisect_left(range(1, wanted + 1), True, key=lambda n: not _fit(replicas, [p + n for p in prompts]))


def _fit(replicas: Sequence[Replica], lengths: Sequence[int]) -> bool:
    """Whether sequences of so many tokens find room in these replicas together, were they empty."""
    return assign(replicas, lengths, [0] * len(replicas)) is not None


def assign(replicas: Sequence[Replica], lengths: Sequence[int], used: Sequence[int] | None) -> list[int] | None:
    """An index of a replica for each sequence: the longest first, to whichever has most of its budget free.

    Args:
        replicas: of one model.
        lengths: tokens of each sequence.
        used: blocks of each replica that are promised already; None to place by load alone, budget or not.

    Returns:
        None when some sequence finds no replica.
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
