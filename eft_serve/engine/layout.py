"""One forward as index tensors, built once and used by every layer; knows nothing of the model.

Rows with equally many new tokens form a *group* and are attended to together: all decoding rows are one group, a
prefill is usually alone in its own. A group is attended to in *parts*, as many rows at a time as keep the keys and
values that they gather small. Row b's cached tokens are in their natural order, one block after the other. What
follows the last one is hidden by a mask. It is zero or the row's own, because 0 · NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.block_pool import BLOCK_SIZE, NULL_BLOCK
from eft_serve.engine.paged_tensors import block_rows, head_rows

_PART_ELEMENTS = 1 << 19  # gathered keys of one part on a CPU, few enough to stay in its caches


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one layer's attention on this rank."""

    kv_heads: int
    repeats: int  # query heads for each key-value head
    head_dim: int


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a group, as one kind of attention sees them."""

    rows: slice  # of the group
    blocks: Tensor  # [rows, kv_heads, num_blocks] int64, see `block_rows`
    kv_length: int  # columns attended to; gathered blocks may hold a few more
    mask: Tensor | None  # [rows, 1, repeats * q_length, kv_length], 0 where attended and −inf elsewhere; None: all


@dataclass(frozen=True, slots=True)
class Packed:
    """All rows of a forward without padding, one after the other in the flat order."""

    slots: Tensor  # [tokens of all rows, cached and new] int64
    query_starts: Tensor  # [num_rows + 1] int32, cumulative
    key_starts: Tensor  # [num_rows + 1] int32, cumulative
    longest_query: int
    longest_key: int


@dataclass(slots=True)
class Group:
    """Rows with equally many new tokens."""

    start: int  # the group's first token in the flat order
    q_length: int  # new tokens of each row
    lengths: NDArray[np.int64]  # [batch], tokens of each row, cached and new
    num_logits: list[int]  # wanted of each row, its last new tokens
    tables: Tensor  # [batch, num_blocks] int64, each row's blocks in order; the null block where it has no more
    positions: Tensor  # [batch, q_length] int64
    slots: Tensor  # [batch, q_length] int64, where each new token's key and value go: block * BLOCK_SIZE + offset
    adapters: list[str | None]  # each row's
    _parts: dict[tuple[int | None, Heads], list[Part]] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def stop(self) -> int:
        """One past the group's last token in the flat order."""
        return self.start + self.batch_size * self.q_length

    @property
    def tokens(self) -> slice:
        """The group's tokens in the flat order."""
        return slice(self.start, self.stop)

    @property
    def nothing_cached(self) -> bool:
        """All tokens of all rows are new."""
        return bool((self.lengths == self.q_length).all())

    def parts(self, window: int | None, heads: Heads, dtype: torch.dtype) -> list[Part]:
        """What to gather and to hide, part by part.

        Args:
            window: sliding window in tokens, the query's own included; None sees everything before.
            heads: the layer's; queries of one key-value head are stacked, one block of rows after the other.
            dtype: of the queries.
        """
        if window is not None and window >= self.lengths.max():
            window = None
        key = (window, heads)
        if key not in self._parts:
            self._parts[key] = [self._part(rows, window, heads, dtype) for rows in self._slices(heads)]
        return self._parts[key]

    def _slices(self, heads: Heads) -> list[slice]:
        size = self.batch_size
        if self.tables.device.type == "cpu":
            size = max(1, _PART_ELEMENTS // (self.tables.shape[1] * BLOCK_SIZE * heads.kv_heads * heads.head_dim))
        return [slice(i, min(i + size, self.batch_size)) for i in range(0, self.batch_size, size)]

    def _part(self, rows: slice, window: int | None, heads: Heads, dtype: torch.dtype) -> Part:
        tables, positions, lengths = self.tables[rows], self.positions[rows], self.lengths[rows]
        device = tables.device
        first: Tensor | int = 0  # column of the first key gathered
        if window is not None:
            first_block = (positions[:, :1] - window + 1).clamp(min=0) // BLOCK_SIZE
            reach = -(-(self.q_length + window - 1) // BLOCK_SIZE) + 1
            columns = first_block + torch.arange(min(reach, tables.shape[1]), device=device)
            tables = tables.gather(1, columns.clamp(max=tables.shape[1] - 1))
            first = first_block * BLOCK_SIZE
        kv_length = int(lengths.max()) if window is None else tables.shape[1] * BLOCK_SIZE
        blocks = block_rows(tables[:, : -(-kv_length // BLOCK_SIZE)], heads.kv_heads)
        if window is None and self.q_length == 1 and lengths.min() == kv_length:
            return Part(rows, blocks, kv_length, None)
        key = first + torch.arange(kv_length, device=device)  # [rows or 1, kv_length], position of each column
        key = key.view(-1, 1, kv_length)
        hidden = key > positions[:, :, None]
        if window is not None:
            hidden |= key <= positions[:, :, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return Part(rows, blocks, kv_length, mask[:, None].repeat(1, 1, heads.repeats, 1))


@dataclass(slots=True)
class Layout:
    """All index tensors of one forward; tokens are in the order of the groups."""

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, each within its own sequence
    slots: Tensor  # [num_tokens] int64, where each token's key and value go
    logit_index: Tensor  # [num_logits] int64, flat token of each wanted row, in the order of the batch's rows
    begun: Tensor | None  # int64, blocks that this forward begins and does not fill; what they held must not be read
    groups: list[Group]
    _cache_rows: dict[int, Tensor] = field(default_factory=dict)
    _packed: Packed | None = None

    def packed(self) -> Packed:
        """Built at the first call."""
        if self._packed is None:
            self._packed = _pack(self.groups)
        return self._packed

    def cache_rows(self, kv_heads: int) -> Tensor:
        """[num_tokens * kv_heads] int64, the new tokens' rows of a cache seen as [num_blocks * kv_heads * 16, ...]."""
        if kv_heads not in self._cache_rows:
            self._cache_rows[kv_heads] = head_rows(self.slots, kv_heads).flatten()
        return self._cache_rows[kv_heads]

    @classmethod
    def of(cls, batch: ForwardBatch, device: torch.device) -> Layout:
        by_length = sorted(range(len(batch.rows)), key=lambda i: len(batch.rows[i].token_ids))
        order: list[int] = []
        groups: list[Group] = []
        stops: dict[int, int] = {}  # one past each row's last token in the flat order
        start = 0
        for q_length, members in groupby(by_length, key=lambda i: len(batch.rows[i].token_ids)):
            indices = list(members)
            groups.append(_group([batch.rows[i] for i in indices], start, q_length, device))
            for i in indices:
                start += q_length
                stops[i] = start
            order += indices
        wanted = [t for i, row in enumerate(batch.rows) for t in range(stops[i] - row.num_logits, stops[i])]
        ids = [token for i in order for token in batch.rows[i].token_ids]
        begun = [row.block_ids[-1] for row in batch.rows if _begins_last_block(row)]
        return cls(
            input_ids=torch.tensor(ids, device=device),
            positions=_joined([group.positions.flatten() for group in groups]),
            slots=_joined([group.slots.flatten() for group in groups]),
            logit_index=torch.tensor(wanted, dtype=torch.int64, device=device),
            begun=torch.tensor(begun, device=device) if begun else None,
            groups=groups,
        )


def _pack(groups: Sequence[Group]) -> Packed:
    slots = []
    for group in groups:
        positions = torch.arange(int(group.lengths.max()), device=group.tables.device).expand(group.batch_size, -1)
        is_real = positions < torch.from_numpy(group.lengths).to(positions.device)[:, None]
        slots.append(_slots(group.tables, positions)[is_real])
    key_lengths = [length for group in groups for length in group.lengths.tolist()]
    query_lengths = [group.q_length for group in groups for _ in group.lengths]
    device = slots[0].device
    return Packed(
        slots=torch.cat(slots),
        query_starts=torch.tensor([0, *accumulate(query_lengths)], dtype=torch.int32, device=device),
        key_starts=torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32, device=device),
        longest_query=max(query_lengths),
        longest_key=max(key_lengths),
    )


def _begins_last_block(row: BatchRow) -> bool:
    end = row.position + len(row.token_ids)
    return 0 < end % BLOCK_SIZE <= len(row.token_ids)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _slots(tables: Tensor, positions: Tensor) -> Tensor:
    return tables.gather(1, positions // BLOCK_SIZE) * BLOCK_SIZE + positions % BLOCK_SIZE


def _group(rows: Sequence[BatchRow], start: int, q_length: int, device: torch.device) -> Group:
    tables = np.full((len(rows), max(len(row.block_ids) for row in rows)), NULL_BLOCK)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.block_ids)] = row.block_ids
    positions = np.array([row.position for row in rows])[:, None] + np.arange(q_length)
    block, offset = np.divmod(positions, BLOCK_SIZE)
    slots = tables[np.arange(len(rows))[:, None], block] * BLOCK_SIZE + offset
    return Group(
        start=start,
        q_length=q_length,
        lengths=positions[:, -1] + 1,
        num_logits=[row.num_logits for row in rows],
        tables=torch.from_numpy(tables).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        adapters=[row.adapter for row in rows],
    )
