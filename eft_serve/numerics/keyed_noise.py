"""Gumbel noise as a pure function of (seed, position, token id); knows nothing of batches or distributions.

A counter-based generator (SplitMix64's finaliser, Steele et al. 2014) in wrapping 64-bit arithmetic: no state, so the
same triple gives the same noise in any process and any batch, whichever other tokens survive. Here it is computed by
torch, on any device; `kernels.drawing` has a compiled version for few tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.uint64]
Integers = NDArray[np.int64]  # not a scalar: numpy warns of scalars that wrap

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
UNIFORM_BITS = 52  # (bits + ½) · 2⁻⁵² is exact in float64 and never 0 or 1

MAX_NOISE = -math.log(-math.log1p(-(2.0**-53)))  # 36.7
MIN_NOISE = -math.log(53 * math.log(2.0))  # −3.6


def to_int64(value: int) -> int:
    """The signed number with the same low 64 bits, as an int64 tensor can hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def row_keys(seeds: Integers, positions: Integers) -> Bits:
    """One 64-bit key for each (seed, position), all [num_rows]."""
    return _mix(_mix(_bits(seeds) + GOLDEN) + _bits(positions) * GOLDEN)


def gumbel(keys: Bits, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise between MIN_NOISE and MAX_NOISE, [num_keys, num_tokens] float64.

    Args:
        keys: [num_keys], see `row_keys`.
        token_ids: [num_tokens] int64, on any device.
    """
    golden, mix_1, mix_2 = (int(number.view(np.int64)) for number in (GOLDEN, MIX_1, MIX_2))  # modulo 2⁶⁴
    state = torch.from_numpy(keys.view(np.int64)).to(token_ids.device)[:, None] + (token_ids + 1) * golden
    state = (state ^ _shifted(state, 30)) * mix_1
    state = (state ^ _shifted(state, 27)) * mix_2
    bits = _shifted(state ^ _shifted(state, 31), 64 - UNIFORM_BITS)
    return -(-((bits.double() + 0.5) * 2.0**-UNIFORM_BITS).log()).log()


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _bits(integers: Integers) -> Bits:
    return integers.view(np.uint64)


def _mix(state: Bits) -> Bits:
    state = state ^ (state >> np.uint64(30))
    state *= MIX_1
    state ^= state >> np.uint64(27)
    state *= MIX_2
    state ^= state >> np.uint64(31)
    return state
