"""Bit masks over tokens applied to rows of logits, compiled for a CPU; knows arrays only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eft_serve.numerics.kernels.bits import Floats, Integers, compiled

_IMPOSSIBLE = np.float32(-np.inf)


@compiled
def mask_row(bitmask: NDArray[np.int32], row: Floats) -> None:
    """Set to −inf what the mask does not allow; bit i % 32 of word i // 32 allows token i, no bit allows no token."""
    num_whole = min(len(row) // 32, len(bitmask))
    for word in range(num_whole):
        bits = bitmask[word]
        if bits == np.int32(-1):
            continue
        block = row[32 * word : 32 * word + 32]
        for i in range(32):  # of known length and without a condition, so that it is vectorised
            block[i] = block[i] if (bits >> np.int32(i)) & np.int32(1) else _IMPOSSIBLE
    for i in range(32 * num_whole, len(row)):
        word = i // 32
        if word >= len(bitmask) or not (bitmask[word] >> np.int32(i % 32)) & np.int32(1):
            row[i] = _IMPOSSIBLE


@compiled
def set_bits(bitmask: NDArray[np.int32], token_ids: Integers, allowed: bool) -> None:
    """Allow or forbid some tokens, each below 32 × the words of the mask."""
    for token_id in token_ids:
        word, bit = token_id // 32, np.int32(1 << (token_id % 32))
        bitmask[word] = bitmask[word] | bit if allowed else bitmask[word] & ~bit
