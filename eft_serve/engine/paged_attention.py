"""Attention by our own kernel on the blocks in place, for CPUs in float32; long prefills use torch's kernel."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from eft_serve.engine.attention import GroupedAttention
from eft_serve.engine.layout import Group
from eft_serve.engine.paged_tensors import PagedTensors

MAX_NEW_TOKENS = 16  # of a row; more are arithmetic rather than reading, which torch does better on gathered blocks

_SHARE = 1 << 18  # elements of keys from which another thread pays off


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cpu" and dtype == torch.float32


class PagedAttention(GroupedAttention):
    """Group by group: rows with few new tokens by the kernel, the others by torch's scaled dot product."""

    name = "paged"

    def __init__(self) -> None:
        from eft_serve.engine.paged_kernel import attend  # takes half a second, so only where it is used

        self._kernel = attend
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="attention")

    def attend(
        self,
        layer: int,
        group: Group,
        cache: PagedTensors,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if group.q_length > MAX_NEW_TOKENS or softcap is not None:
            return super().attend(
                layer, group, cache, query, key, value, scaling=scaling, window=window, softcap=softcap
            )
        query = query[group.tokens]
        out = query.new_empty(*query.shape[:2], cache.values[layer].shape[3])
        keys, values = cache.keys[layer].numpy(), cache.values[layer].numpy()
        queries, outputs, tables = query.contiguous().numpy(), out.numpy(), group.tables.numpy()
        window = sys.maxsize if window is None else window
        scaling = query.shape[2] ** -0.5 if scaling is None else scaling

        def attend(rows: slice) -> None:
            tokens = slice(rows.start * group.q_length, rows.stop * group.q_length)
            arrays = queries[tokens], keys, values, tables[rows], group.lengths[rows]
            self._kernel(*arrays, window, scaling, outputs[tokens])

        num_elements = int(group.lengths.sum()) * keys.shape[1] * keys.shape[3]
        shares = _shares(group.batch_size, min(torch.get_num_threads(), num_elements // _SHARE))
        if len(shares) == 1:
            attend(shares[0])
        else:
            list(self._threads.map(attend, shares))  # raises what the threads raised
        return out


def _shares(num_rows: int, most: int) -> list[slice]:
    """The rows in neighbouring parts, as even as can be; no more than are wanted."""
    count = max(1, min(num_rows, most))
    bounds = [num_rows * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
