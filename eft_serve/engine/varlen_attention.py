"""Attention by torch's variable-length flash kernel, for GPUs in 16 bits: rows of any length in one call, none padded.

The kernel's own block tables need pages of 256 tokens; ours are 16, so that prefixes are shared finely, and the tokens
are gathered in one indexed read first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eft_serve.engine.layout import Layout
from eft_serve.engine.paged_tensors import PagedTensors
from eft_serve.engine.ragged_path import UnsupportedModelError

MAX_HEAD_DIM = 256


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _torch_kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


class VarlenAttention:
    """All rows in one call a layer.

    Args:
        kernel: with the contract of `torch.nn.attention.varlen.varlen_attn`, which is the default.
    """

    name = "varlen"

    def __init__(self, kernel: Callable[..., Any] | None = None) -> None:
        self._kernel = kernel or _torch_kernel()

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
        if softcap is not None or not query.shape[2] == key.shape[2] == value.shape[2] <= MAX_HEAD_DIM:
            raise UnsupportedModelError(f"softcap {softcap} or heads of {query.shape[2]}, which the kernel has not")
        cache.write(layer, layout.cache_rows(key.shape[1]), key, value)
        packed = layout.packed()
        keys, values = cache.gather_slots(layer, packed.slots)
        out: Tensor = self._kernel(
            query.contiguous(),
            keys,
            values,
            packed.query_starts,
            packed.key_starts,
            packed.longest_query,
            packed.longest_key,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out
