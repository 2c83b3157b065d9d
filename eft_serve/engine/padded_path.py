"""The forward of models that compute their own attention (Falcon, BLOOM); knows no sequences.

Such a model takes a `transformers` cache object and a padding mask. It gets a view of our paged cache that returns
every row's keys and values aligned to the right, padded with the null block, which is what left-padded batches look
like. Rows with equally many new tokens share a forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from eft_serve.engine.adapters import Adapters
from eft_serve.engine.attention import Attention
from eft_serve.engine.block_pool import BLOCK_SIZE, NULL_BLOCK
from eft_serve.engine.layout import Group, Layout
from eft_serve.engine.paged_tensors import PagedTensors, head_rows


@dataclass(frozen=True, slots=True)
class _Aligned:
    """A group with every row's newest token in the last column."""

    slots: Tensor  # [batch, kv_length] int64
    mask: Tensor  # [batch, kv_length] bool, True where there is a token

    @classmethod
    def of(cls, group: Group) -> _Aligned:
        device = group.tables.device
        width = max(group.lengths)
        length = torch.tensor(group.lengths, device=device)[:, None]
        token = torch.arange(width, device=device) - (width - length)  # negative where padded
        block = group.tables.gather(1, token.clamp(min=0) // BLOCK_SIZE)
        slots = torch.where(token >= 0, block * BLOCK_SIZE + token % BLOCK_SIZE, NULL_BLOCK * BLOCK_SIZE)
        return cls(slots, token >= 0)


class _PagedLayer(CacheLayerMixin):
    """One layer of the paged cache, as seen by one group of rows."""

    is_sliding = False

    def __init__(self, cache: PagedTensors, layer: int, group: Group, aligned: _Aligned) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._cache, self._layer, self._group, self._aligned = cache, layer, group, aligned

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy here."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, q_length, head_dim], return [batch, kv_heads, kv_length, head_dim]."""
        new_key, new_value = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))
        rows = head_rows(self._group.slots, new_key.shape[1]).flatten()
        self._cache.write(self._layer, rows, new_key, new_value)
        key, value = self._cache.gather_slots(self._layer, self._aligned.slots)
        return key.transpose(1, 2), value.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._aligned.slots.shape[1], 0

    def get_seq_length(self) -> int:
        return self._aligned.slots.shape[1] - self._group.q_length

    def get_max_length(self) -> int:
        return -1


class PaddedPath:
    """One forward for each group of rows, on left-padded keys and values; the model attends by itself."""

    name = "padded"

    def __init__(self, model: PreTrainedModel, attention: Attention, adapters: Adapters) -> None:
        self._model = model
        self._adapters = adapters

    def forward(self, layout: Layout, cache: PagedTensors) -> Tensor:
        """Logits [num_logits, vocab_size] in the order of `layout.logit_index`."""
        logits = torch.cat([self._forward_group(layout, group, cache) for group in layout.groups])
        rank = layout.logit_index.argsort().argsort()  # the model answers in flat order
        return logits[rank]

    def _forward_group(self, layout: Layout, group: Group, cache: PagedTensors) -> Tensor:
        self._adapters.select([group])
        most = max(1, *group.num_logits)
        aligned = _Aligned.of(group)
        output = self._model(
            input_ids=layout.input_ids[group.start : group.stop].view(group.positions.shape),
            position_ids=group.positions,
            attention_mask=aligned.mask.long(),
            past_key_values=Cache(layers=[_PagedLayer(cache, i, group, aligned) for i in range(len(cache.keys))]),
            use_cache=True,
            logits_to_keep=most,
        )
        kept: Tensor = output.logits  # [batch, most, vocab_size]
        return torch.cat([row[most - count :] for row, count in zip(kept, group.num_logits, strict=True)])
