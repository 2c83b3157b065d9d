"""Attention by our own kernel over the blocks where they stand, for CPUs in float32; long prefills go another way."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from eft_serve.engine.attention import GroupedAttention, joined
from eft_serve.engine.layout import Group, Layout
from eft_serve.engine.paged_tensors import PagedTensors

MAX_NEW_TOKENS = 16  # of a row; more are arithmetic rather than reading, which torch does better on gathered blocks


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cpu" and dtype == torch.float32


class PagedAttention:
    """Group by group: rows with few new tokens by the kernel, the others by torch's scaled dot product."""

    name = "paged"

    def __init__(self) -> None:
        from eft_serve.engine.paged_kernel import attend  # takes half a second, which nobody else need wait for

        self._kernel = attend
        self._prefills = GroupedAttention()

    def __call__(
        self,
        layer: int,
        layout: Layout,
        cache: PagedTensors,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        cache.write(layer, layout.cache_rows(key.shape[1]), key, value)
        outputs = []
        for group in layout.groups:
            if group.q_length <= MAX_NEW_TOKENS and softcap is None:
                outputs.append(self._attend(layer, group, cache, query[group.tokens], scaling, window))
            else:
                outputs.append(
                    self._prefills.attend(
                        layer, group, cache, query, key, value, scaling=scaling, window=window, softcap=softcap
                    )
                )
        return joined(outputs)

    def _attend(
        self, layer: int, group: Group, cache: PagedTensors, query: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        out = query.new_empty(*query.shape[:2], cache.values[layer].shape[3])
        self._kernel(
            query.contiguous().numpy(),
            cache.keys[layer].numpy(),
            cache.values[layer].numpy(),
            group.tables.numpy(),
            group.lengths,
            sys.maxsize if window is None else window,
            query.shape[2] ** -0.5 if scaling is None else scaling,
            out.numpy(),
        )
        return out
