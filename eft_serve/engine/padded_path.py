"""The forward of models that compute their own attention (Falcon, BLOOM); knows no sequences.

Such a model takes a `transformers` cache object and a padding mask. It gets a view of our paged cache that returns
every row's keys and values aligned to the right, which is what left-padded batches look like. Rows with equally many
new tokens share a forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from eft_serve.engine.attention import PagedTensors
from eft_serve.engine.layout import Group, Layout


class _PagedLayer(CacheLayerMixin):
    """One layer of the paged cache, as seen by one group of rows."""

    is_sliding = False

    def __init__(self, cache: PagedTensors, layer: int, group: Group) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._cache, self._layer, self._group = cache, layer, group

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy here."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, q_length, head_dim], return [batch, kv_heads, kv_length, head_dim]."""
        slots = self._group.slots[:, -self._group.q_length :].flatten()
        key, value = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))
        self._cache.write(self._layer, slots, key, value)
        return self._cache.read(self._layer, self._group.slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._group.kv_length, 0

    def get_seq_length(self) -> int:
        return self._group.kv_length - self._group.q_length

    def get_max_length(self) -> int:
        return -1


class PaddedPath:
    """One forward for each group of rows, on left-padded keys and values."""

    name = "padded"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def forward(self, layout: Layout, cache: PagedTensors) -> Tensor:
        """Logits [num_logits, vocab_size] in the order of `layout.logit_index`."""
        logits = torch.cat([self._forward_group(layout, group, cache) for group in layout.groups])
        rank = layout.logit_index.argsort().argsort()  # the model answers in flat order
        return logits[rank]

    def _forward_group(self, layout: Layout, group: Group, cache: PagedTensors) -> Tensor:
        most = max(1, *group.num_logits)
        output = self._model(
            input_ids=layout.input_ids[group.start : group.stop].view(group.positions.shape),
            position_ids=group.positions,
            attention_mask=group.padding_mask().long(),
            past_key_values=Cache(layers=[_PagedLayer(cache, i, group) for i in range(len(cache.keys))]),
            use_cache=True,
            logits_to_keep=most,
        )
        kept: Tensor = output.logits  # [batch, most, vocab_size]
        return torch.cat([row[most - count :] for row, count in zip(kept, group.num_logits, strict=True)])
