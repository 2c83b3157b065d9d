"""Bit masks over rows of any width, against the same in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eft_serve.numerics.bitmask import apply_bitmask
from eft_serve.numerics.kernels.masking import set_bits

WORDS = np.array([-1, 0, 5, -7, 2**31 - 1, -(2**31)], np.int32)


@pytest.mark.parametrize("num_words", [0, 1, 2, 3, 31])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 95, 1000])
def test_only_tokens_with_a_bit_stay_possible_and_keep_their_logits(width: int, num_words: int) -> None:
    bitmask = np.random.default_rng(width).choice(WORDS, num_words)
    row = torch.randn(width, generator=torch.Generator().manual_seed(width))
    allowed = np.zeros(width, bool)
    bits = np.unpackbits(bitmask.view(np.uint8), bitorder="little")[:width]
    allowed[: len(bits)] = bits
    expected = torch.where(torch.from_numpy(allowed), row, -torch.inf)
    apply_bitmask(bitmask, row)
    assert torch.equal(row, expected)


def test_bits_of_tokens_are_set_and_taken_away_and_no_others() -> None:
    bitmask = np.array([6, 0, 0], np.int32)
    set_bits(bitmask, np.array([0, 31, 63, 64]), allowed=True)
    assert bitmask.tolist() == [7 - 2**31, -(2**31), 1]
    set_bits(bitmask, np.array([0, 31, 95]), allowed=False)
    set_bits(bitmask, np.array([], np.int64), allowed=True)
    assert bitmask.tolist() == [6, -(2**31), 1]
