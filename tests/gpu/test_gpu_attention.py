"""The flash kernel on a real GPU, and the grouped attention in 16 bits, against the grouped one in float32."""

from __future__ import annotations

import pytest
import torch
from gpu_models import flash_kernel, has_contract
from torch import Tensor

from eft_serve.engine.attention import Attention, GroupedAttention
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.layout import Layout
from eft_serve.engine.paged_tensors import PagedTensors
from eft_serve.engine.varlen_attention import VarlenAttention

HEADS = 4
NUM_BLOCKS = 32
ROWS = [  # decode, prefill, chunk after cached tokens, verification of a draft, decode, long prefill and decode
    BatchRow([1], 36, [3, 5, 1], 1),
    BatchRow(list(range(20)), 0, [7, 2], 1),
    BatchRow(list(range(9)), 17, [4, 6], 1),
    BatchRow([1, 2, 3], 30, [8, 9, 10], 3),
    BatchRow([1], 0, [11], 1),
    BatchRow(list(range(130)), 0, list(range(12, 21)), 1),
    BatchRow([1], 150, list(range(21, 31)), 1),
]
# Outputs are means of standard normal values: at most 5, rounded to 8 or 11 bits, like the weights of the mean.
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3}


def attend(
    attention: Attention, device: torch.device, dtype: torch.dtype, window: int | None, kv_heads: int, head_dim: int
) -> Tensor:
    """The same numbers, bfloat16's, in any dtype."""
    generator = torch.Generator().manual_seed(head_dim)
    num_tokens = sum(len(row.token_ids) for row in ROWS)
    shapes = [(NUM_BLOCKS, kv_heads, 16, head_dim)] * 2
    shapes_of_tokens = [(num_tokens, HEADS, head_dim), *[(num_tokens, kv_heads, head_dim)] * 2]
    keys, values, *states = (
        torch.randn(shape, generator=generator).bfloat16().to(device, dtype) for shape in [*shapes, *shapes_of_tokens]
    )
    layout = Layout.of(ForwardBatch(ROWS), device)
    cache = PagedTensors([keys], [values])
    return attention(0, layout, cache, *states, scaling=head_dim**-0.5, window=window).float()


@pytest.mark.parametrize("name", ["varlen", "grouped"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_rows_of_any_length_are_attended_to_as_in_float32(
    device: torch.device, window: int | None, kv_heads: int, head_dim: int, dtype: torch.dtype, name: str
) -> None:
    if name == "varlen" and device.type != "cuda":
        pytest.skip("the flash kernel runs on a GPU alone")
    attention: Attention = GroupedAttention() if name == "grouped" else VarlenAttention(flash_kernel())
    found = attend(attention, device, dtype, window, kv_heads, head_dim)
    expected = attend(GroupedAttention(), device, torch.float32, window, kv_heads, head_dim)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
    assert expected.abs().max() > 1, "nothing was attended to"


def test_torchs_own_kernel_takes_what_the_engine_gives_it(gpu: torch.device) -> None:
    if not has_contract():
        pytest.skip(f"torch {torch.__version__} is older than the contract; the engine takes grouped attention there")
    assert attend(VarlenAttention(), gpu, torch.bfloat16, None, 2, 64).isfinite().all()
