"""Tokens that may be drawn, as bits; knows rows of logits, and not why a token may not."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.numerics.kernels.masking import mask_row


def apply_bitmask(bitmask: NDArray[np.int32], row: Tensor) -> None:
    """Make all other tokens impossible, in place.

    Args:
        bitmask: [num_words]; bit i % 32 of word i // 32 allows token i, and no bit allows no token.
        row: [vocab_size] float32, contiguous.
    """
    if row.device.type == "cpu":
        mask_row(bitmask, row.numpy())
        return
    octets = torch.from_numpy(bitmask).to(row.device).view(torch.uint8)
    bits = octets[:, None] >> torch.arange(8, device=row.device, dtype=torch.uint8) & 1
    allowed = bits.flatten()[: len(row)].bool()
    row[: len(allowed)].masked_fill_(~allowed, -torch.inf)
    row[len(allowed) :] = -torch.inf
