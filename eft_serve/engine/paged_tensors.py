"""The keys and values themselves; knows where a token is stored, not whose it is.

A cache is [num_blocks, kv_heads, BLOCK_SIZE, head_dim]: one head's tokens of a block are adjacent, so that gathering
a sequence copies long runs and the product with its keys reads memory in order. On two AMD cores a decode of 32 rows
over 140 tokens took 15.8 ms token by token and 9.4 ms in this layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eft_serve.engine.batch import Copy
from eft_serve.engine.block_pool import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class PagedTensors:
    """The keys and values of every layer: [num_blocks, kv_heads of this rank, BLOCK_SIZE, head_dim] each."""

    keys: list[Tensor]
    values: list[Tensor]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy blocks in every layer: all are read before one is written, and a target's last source counts."""
        if copies:
            sources = {target: source for source, target in copies}
            device = self.keys[0].device
            source, target = (torch.tensor(list(ids), device=device) for ids in (sources.values(), sources))
            for cache in (*self.keys, *self.values):
                cache.index_copy_(0, target, cache.index_select(0, source))

    def clear(self, blocks: Tensor | None) -> None:
        """Zero these blocks in every layer, before a forward that begins them without filling them."""
        if blocks is not None:
            for cache in (*self.keys, *self.values):
                cache.index_fill_(0, blocks, 0.0)

    def write(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Store [num_tokens, kv_heads, head_dim] at [num_tokens * kv_heads] rows, see `head_rows`.

        Raises:
            ValueError: these are not the heads that the cache was made for.
        """
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            if new.shape[1:] != (cache.shape[1], cache.shape[3]):
                made_for = f"{cache.shape[1]} heads of {cache.shape[3]}"
                raise ValueError(
                    f"layer {layer} stores {new.shape[1]} heads of {new.shape[2]}, its cache has {made_for}"
                )
            cache.view(-1, cache.shape[3]).index_copy_(0, rows, new.reshape(-1, cache.shape[3]))

    def gather(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of [rows, kv_heads, num_blocks] `block_rows`, each [rows, kv_heads, length, head_dim]."""
        key, value = (
            cache.view(-1, BLOCK_SIZE * cache.shape[3])
            .index_select(0, blocks.flatten())
            .view(*blocks.shape[:2], -1, cache.shape[3])[:, :, :length]
            for cache in (self.keys[layer], self.values[layer])
        )
        return key, value

    def gather_slots(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of any slots [...], each [..., kv_heads, head_dim]."""
        key, value = (
            cache.view(-1, cache.shape[3])[head_rows(slots, cache.shape[1])]
            for cache in (self.keys[layer], self.values[layer])
        )
        return key, value


def head_rows(slots: Tensor, kv_heads: int) -> Tensor:
    """[..., kv_heads] int64: rows of these slots in a cache seen as [num_blocks * kv_heads * BLOCK_SIZE, ...]."""
    head = torch.arange(0, kv_heads * BLOCK_SIZE, BLOCK_SIZE, device=slots.device)
    first = slots + slots // BLOCK_SIZE * ((kv_heads - 1) * BLOCK_SIZE)
    return first[..., None] + head


def block_rows(tables: Tensor, kv_heads: int) -> Tensor:
    """[rows, kv_heads, num_blocks] int64: rows of these blocks in a cache seen as [num_blocks * kv_heads, ...]."""
    return tables[:, None] * kv_heads + torch.arange(kv_heads, device=tables.device)[:, None]
