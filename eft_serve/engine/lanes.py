"""Dense copies of the sequences that are being decoded, for devices whose attention cannot follow a block table.

Gathering every row's blocks anew for each token costs a CPU more than attending to them. A *lane* keeps one sequence's
keys and values in one piece; each step appends its new tokens, so that a decode reads all of it once, where it stands.
The blocks stay the truth: a sequence that is new here, or that went another way meanwhile, is copied from them. What a
lane holds follows from the batches alone, so all tensor-parallel ranks agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eft_serve.engine.batch import BatchRow
from eft_serve.engine.block_pool import BLOCK_SIZE
from eft_serve.engine.paged_tensors import PagedTensors

NUM_LANES = 64
LANE_TOKENS = 4096  # longer sequences are gathered
MAX_NEW_TOKENS = 8  # a step that appends more is a prefill
IDLE_FORWARDS = 8  # a lane that no forward used for so many is anybody's


@dataclass(slots=True)
class _Lane:
    owner: int
    length: int = 0  # tokens held
    extent: int = 0  # tokens ever written since it was zero
    last_used: int = 0  # number of a forward


class Lanes:
    """At most `NUM_LANES` of them; their memory is taken only as far as they are used."""

    def __init__(self, paged: PagedTensors) -> None:
        self._paged = paged
        self._lanes: list[_Lane] = []
        self._forward = 0
        self.keys, self.values = ([_like(cache) for cache in caches] for caches in (paged.keys, paged.values))

    def begin_forward(self) -> None:
        """Lanes given out from here on serve one forward together."""
        self._forward += 1

    def assign(self, rows: Sequence[BatchRow]) -> list[int] | None:
        """Each row's lane, holding all its cached tokens; None when these rows cannot all have one.

        To be asked about all rows of a forward, so that a lane learns of tokens that bypass it.
        """
        by_owner = {lane.owner: lane for lane in self._lanes}
        for row in rows:
            if lane := by_owner.get(row.owner):
                lane.length, lane.last_used = min(lane.length, row.position), self._forward
        if not all(_fits(row) for row in rows):
            return None
        lanes = [by_owner.get(row.owner) or self._take(row.owner) for row in rows]
        found = [lane for lane in lanes if lane is not None]
        if len(found) < len(rows):
            return None
        index = {id(lane): i for i, lane in enumerate(self._lanes)}
        for lane, row in zip(found, rows, strict=True):
            if lane.length < row.position:
                self._copy(index[id(lane)], lane.length, row)
            lane.length = row.position + len(row.token_ids)
            lane.extent = max(lane.extent, lane.length + BLOCK_SIZE)
        return [index[id(lane)] for lane in found]

    def read(self, layer: int, lanes: slice, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of neighbouring lanes, each [lanes, kv_heads, length, head_dim]."""
        return self.keys[layer][lanes, :, :length], self.values[layer][lanes, :, :length]

    def write(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Store [num_tokens, kv_heads, head_dim] at [num_tokens * kv_heads] rows, see `lane_rows`."""
        for lanes, new in ((self.keys[layer], key), (self.values[layer], value)):
            lanes.view(-1, lanes.shape[3]).index_copy_(0, rows, new.reshape(-1, lanes.shape[3]))

    def _take(self, owner: int) -> _Lane | None:
        """The first idle lane, else a new one, else the one used longest ago; None when this forward uses all."""
        index = next((i for i, x in enumerate(self._lanes) if self._forward - x.last_used > IDLE_FORWARDS), None)
        if index is None and len(self._lanes) < NUM_LANES:
            self._lanes.append(_Lane(owner, last_used=self._forward))
            return self._lanes[-1]
        if index is None:
            unused = (i for i, lane in enumerate(self._lanes) if lane.last_used < self._forward)
            index = min(unused, key=lambda i: self._lanes[i].last_used, default=None)
        if index is None:
            return None
        for lanes in (*self.keys, *self.values):  # what is hidden by a mask must still be finite
            lanes[index, :, : self._lanes[index].extent] = 0.0
        self._lanes[index] = _Lane(owner, last_used=self._forward)
        return self._lanes[index]

    def _copy(self, index: int, length: int, row: BatchRow) -> None:
        """Copy from the blocks what the lane does not hold before the row's new tokens."""
        first, last = length // BLOCK_SIZE, -(-row.position // BLOCK_SIZE)
        blocks = torch.tensor(row.block_ids[first:last])
        for lanes, caches in ((self.keys, self._paged.keys), (self.values, self._paged.values)):
            for lane, cache in zip(lanes, caches, strict=True):
                by_block = lane[index].unflatten(1, (-1, BLOCK_SIZE))
                by_block[:, first:last] = cache.index_select(0, blocks).transpose(0, 1)


def lane_rows(lanes: Tensor, positions: Tensor, kv_heads: int) -> Tensor:
    """[..., kv_heads] int64: rows of these lanes and positions in a tensor seen as [lanes * kv_heads * tokens, ...]."""
    head = torch.arange(0, kv_heads * LANE_TOKENS, LANE_TOKENS)
    return (lanes * (kv_heads * LANE_TOKENS) + positions)[..., None] + head


def _fits(row: BatchRow) -> bool:
    return len(row.token_ids) <= MAX_NEW_TOKENS and row.position + len(row.token_ids) <= LANE_TOKENS


def _like(cache: Tensor) -> Tensor:
    """[NUM_LANES, kv_heads, LANE_TOKENS, head_dim] of zeros that take no memory before they are written."""
    shape = (NUM_LANES, cache.shape[1], LANE_TOKENS, cache.shape[3])
    untouched = np.zeros(int(np.prod(shape)) * cache.dtype.itemsize, dtype=np.uint8)  # torch.zeros would touch it
    return torch.from_numpy(untouched).view(cache.dtype).view(shape)
