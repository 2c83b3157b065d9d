"""One forward as plain data; knows nothing of tensors, models or who asked."""

from __future__ import annotations

from dataclasses import dataclass, field

Copy = tuple[int, int]  # source and target block


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One sequence's part of one forward."""

    token_ids: list[int]  # the new tokens
    position: int  # of the first of them in its sequence; so many tokens are in the cache
    block_ids: list[int]  # blocks of the sequence, enough for position + len(token_ids) tokens
    num_logits: int  # logits wanted, of the last so many new tokens
    adapter: str | None = None  # None: the model as it is


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What every tensor-parallel rank computes in one forward."""

    rows: list[BatchRow]
    copies: list[Copy] = field(default_factory=list)  # to be made before anything is read or written

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def num_logits(self) -> int:
        return sum(row.num_logits for row in self.rows)
