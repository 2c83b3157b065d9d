"""A large head on a CPU is packed for several rows, and a small one is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eft_serve.engine.weights import PackedHead

LARGE = (256, 4096)


@pytest.mark.parametrize("num_rows", [1, 2, 16, 100])
def test_the_products_are_those_of_the_matrix(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    head = nn.Linear(*LARGE, bias=False)
    states = torch.randn(num_rows, LARGE[0], generator=generator)
    assert PackedHead.suits(head)
    with torch.inference_mode():
        torch.testing.assert_close(PackedHead(head.weight)(states), head(states), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(*LARGE),
        nn.Linear(*LARGE, bias=False, dtype=torch.bfloat16),
        nn.Embedding(*LARGE),
    ],
    ids=["with a bias", "16 bits", "no linear layer"],
)
def test_other_heads_are_not_packed(head: nn.Module) -> None:
    assert not PackedHead.suits(head)
