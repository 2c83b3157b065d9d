"""One forward as index tensors, built once and used by every layer; knows nothing of the model.

Rows with equally many new tokens form a *group* and are attended to together: all decoding rows are one group, a
prefill is usually alone in its own. Within a group the cached tokens are aligned to the right: row b's newest token
stands in the last column, shorter rows are padded on the left with the null block. So one causal or sliding pattern
fits all rows, and a window is simply the last columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.block_pool import BLOCK_SIZE, NULL_BLOCK


@dataclass(frozen=True, slots=True)
class GroupView:
    """What one kind of attention sees of a group."""

    slots: Tensor  # [batch, kv_length] int64, cache slots of each row's tokens, padded on the left
    mask: Tensor | None  # [batch, 1, repeats * q_length, kv_length] bool, True where attended; None: everywhere
    is_causal: bool = False  # one row, nothing cached, no window: plain causal attention over the new tokens alone


@dataclass(slots=True)
class Group:
    """Rows with equally many new tokens."""

    start: int  # the group's first token in the flat order
    q_length: int  # new tokens of each row
    lengths: list[int]  # tokens of each row, cached and new
    num_logits: list[int]  # wanted of each row, its last new tokens
    slots: Tensor  # [batch, kv_length] int64
    positions: Tensor  # [batch, q_length] int64
    _views: dict[tuple[int | None, int], GroupView] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def kv_length(self) -> int:
        return self.slots.shape[1]

    @property
    def stop(self) -> int:
        """One past the group's last token in the flat order."""
        return self.start + self.batch_size * self.q_length

    def padding_mask(self) -> Tensor:
        """[batch, kv_length] bool, True where a token stands."""
        columns = torch.arange(self.kv_length, device=self.slots.device)
        first = self.kv_length - torch.tensor(self.lengths, device=self.slots.device)
        return columns >= first[:, None]

    def view(self, window: int | None, repeats: int) -> GroupView:
        """The columns and the mask for full attention, or for a sliding window of so many tokens.

        Args:
            window: tokens that a query sees, itself included; None for all.
            repeats: queries of one kv head at each position, one block of rows after the other.
        """
        if window is not None and window >= max(self.lengths):
            window = None
        key = (window, repeats)
        if key not in self._views:
            self._views[key] = self._build_view(window, repeats)
        return self._views[key]

    def _build_view(self, window: int | None, repeats: int) -> GroupView:
        reach = self.kv_length if window is None else min(self.kv_length, window + self.q_length - 1)
        hidden = self.kv_length - reach
        if self.q_length == 1 and min(self.lengths) >= reach:
            return GroupView(self.slots[:, hidden:], None)
        device = self.slots.device
        key = torch.arange(hidden, self.kv_length, device=device)
        query = torch.arange(self.kv_length - self.q_length, self.kv_length, device=device)[:, None]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        mask = seen[None] & self.padding_mask()[:, None, hidden:]
        is_causal = window is None and self.batch_size == 1 and self.q_length == self.kv_length
        return GroupView(self.slots[:, hidden:], mask[:, None].repeat(1, 1, repeats, 1), is_causal)


@dataclass(frozen=True, slots=True)
class Layout:
    """All index tensors of one forward; tokens stand in the order of the groups."""

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, each within its own sequence
    slots: Tensor  # [num_tokens] int64, where each token's key and value go
    logit_index: Tensor  # [num_logits] int64, flat token of each wanted row, in the order of the batch's rows
    groups: list[Group]

    @classmethod
    def of(cls, batch: ForwardBatch, device: torch.device) -> Layout:
        order = sorted(range(len(batch.rows)), key=lambda i: len(batch.rows[i].token_ids))
        groups: list[Group] = []
        stops: dict[int, int] = {}  # one past each row's last token in the flat order
        start = 0
        for q_length, members in groupby(order, key=lambda i: len(batch.rows[i].token_ids)):
            indices = list(members)
            groups.append(_group([batch.rows[i] for i in indices], start, q_length, device))
            for i in indices:
                start += q_length
                stops[i] = start
        wanted = [t for i, row in enumerate(batch.rows) for t in range(stops[i] - row.num_logits, stops[i])]
        ids = [token for i in order for token in batch.rows[i].token_ids]
        return cls(
            input_ids=torch.tensor(ids, device=device),
            positions=torch.cat([group.positions.flatten() for group in groups]),
            slots=torch.cat([group.slots[:, -group.q_length :].flatten() for group in groups]),
            logit_index=torch.tensor(wanted, dtype=torch.int64, device=device),
            groups=groups,
        )


def _group(rows: Sequence[BatchRow], start: int, q_length: int, device: torch.device) -> Group:
    lengths = [row.position + q_length for row in rows]
    width = max(lengths)
    length = torch.tensor(lengths)[:, None]
    token = torch.arange(width) - (width - length)  # [batch, kv_length], negative where padded
    most_blocks = -(-width // BLOCK_SIZE)
    tables = [row.block_ids[:most_blocks] + [NULL_BLOCK] * (most_blocks - len(row.block_ids)) for row in rows]
    block = torch.tensor(tables).gather(1, token.clamp(min=0) // BLOCK_SIZE)
    slots = torch.where(token >= 0, block * BLOCK_SIZE + token % BLOCK_SIZE, NULL_BLOCK * BLOCK_SIZE)
    positions = length - q_length + torch.arange(q_length)
    wanted = [row.num_logits for row in rows]
    return Group(start, q_length, lengths, wanted, slots.to(device), positions.to(device))
