"""Bit masks over tokens applied to rows of logits, compiled for a CPU; knows arrays only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eft_serve.numerics.kernels.bits import Floats, compiled


@compiled
def mask_row(bitmask: NDArray[np.int32], row: Floats) -> None:
    """Set to −inf what the mask does not allow; bit i % 32 of word i // 32 allows token i, no bit allows no token."""
    width = len(row)
    for start in range(0, width, 32):
        word = start // 32
        bits = bitmask[word] if word < len(bitmask) else np.int32(0)
        if bits == np.int32(-1):
            continue
        stop = min(start + 32, width)
        for i in range(start, stop):
            if not (bits >> np.int32(i - start)) & np.int32(1):
                row[i] = -np.inf
