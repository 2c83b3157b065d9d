"""The index work of the GPU's attention, checked on a CPU with a plain kernel that keeps the documented contract.

The kernel itself runs on a GPU only; there, every load compares the model's logits with the stock model's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eft_serve.engine.attention import GroupedAttention
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.layout import Layout
from eft_serve.engine.paged_tensors import PagedTensors
from eft_serve.engine.ragged_path import UnsupportedModelError
from eft_serve.engine.varlen_attention import VarlenAttention, suits

KV_HEADS, HEADS, HEAD_DIM = 2, 4, 8
CPU = torch.device("cpu")
ROWS = [  # decode, prefill, chunk after cached tokens, verification of a draft, decode
    BatchRow([1], 36, [3, 5, 1], 1),
    BatchRow(list(range(20)), 0, [7, 2], 1),
    BatchRow(list(range(9)), 17, [4, 6], 1),
    BatchRow([1, 2, 3], 30, [8, 9, 10], 3),
    BatchRow([1], 0, [11], 1),
]


def plain_kernel(
    query: Tensor,  # [num_tokens, heads, head_dim]
    key: Tensor,  # [num_keys, kv_heads, head_dim]
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Row by row, query by query; queries are the last tokens of their row."""
    assert (query_starts.dtype, key_starts.dtype) == (torch.int32, torch.int32)
    assert longest_query == int(query_starts.diff().max())
    assert longest_key == int(key_starts.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = torch.empty_like(query)
    for row in range(len(query_starts) - 1):
        q = query[query_starts[row] : query_starts[row + 1]]
        repeats = query.shape[1] // key.shape[1]
        k, v = (x[key_starts[row] : key_starts[row + 1]].repeat_interleave(repeats, 1) for x in (key, value))
        for i in range(len(q)):
            stop = len(k) - len(q) + i + 1 + window_size[1]
            start = 0 if window_size[0] < 0 else max(0, stop - 1 - window_size[0])
            scores = torch.einsum("hd,khd->hk", q[i], k[start:stop]) * (scale or q.shape[2] ** -0.5)
            out[query_starts[row] + i] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[start:stop])
    return out


def filled_cache() -> PagedTensors:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(12, KV_HEADS, 16, HEAD_DIM, generator=generator) for _ in range(2))
    return PagedTensors([keys], [values])


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_it_attends_like_the_other(window: int | None) -> None:
    num_tokens = sum(len(row.token_ids) for row in ROWS)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator)
    key, value = (torch.randn(num_tokens, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    answers = []
    for attention in (VarlenAttention(plain_kernel), GroupedAttention()):
        cache = filled_cache()
        layout = Layout.of(ForwardBatch(ROWS), CPU)
        answers.append(attention(0, layout, cache, query, key, value, scaling=0.3, window=window))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=0)


def test_what_the_kernel_has_not_is_refused() -> None:
    states = torch.zeros(1, 2, HEAD_DIM)
    layout = Layout.of(ForwardBatch(ROWS[:1]), CPU)
    with pytest.raises(UnsupportedModelError, match="softcap"):
        VarlenAttention(plain_kernel)(0, layout, filled_cache(), states, states, states, softcap=30.0)
    wide = torch.zeros(1, 2, 512)
    with pytest.raises(UnsupportedModelError, match="heads of 512"):
        VarlenAttention(plain_kernel)(0, layout, filled_cache(), wide, wide, wide)


def test_it_is_for_gpus_in_16_bits() -> None:
    assert suits(torch.device("cuda"), torch.bfloat16)
    assert not suits(torch.device("cuda"), torch.float32)
    assert not suits(CPU, torch.bfloat16)


def test_torchs_own_kernel_has_this_contract() -> None:
    """It cannot run here; that it is there, and takes these arguments, can be seen."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)
