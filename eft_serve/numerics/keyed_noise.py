"""Gumbel noise as a pure function of (seed, position, token id); knows nothing of batches or distributions.

A counter-based generator (SplitMix64's finaliser, Steele et al. 2014) in wrapping 64-bit arithmetic: no state, so the
same triple gives the same noise in any process and any batch, whichever other tokens survive. It is computed by numpy,
whose small operations take half the time of torch's and whose large ones two thirds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]
Integers = NDArray[np.int64]  # any shape but none: numpy warns of scalars that wrap

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_UNIFORM_BITS = 52  # (bits + ½) · 2⁻⁵² is exact in float64 and never 0 or 1
_ONE = np.uint64(1)

MAX_NOISE = -math.log(-math.log1p(-(2.0**-53)))  # 36.7
MIN_NOISE = -math.log(53 * math.log(2.0))  # −3.6


def to_int64(value: int) -> int:
    """The signed number with the same low 64 bits, as an int64 tensor can hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def row_keys(seeds: Integers, positions: Integers) -> Bits:
    """One 64-bit key for each (seed, position), all [num_rows]."""
    return _mix(_mix(_bits(seeds) + _GOLDEN) + _bits(positions) * _GOLDEN)


def gumbel(keys: Bits, token_ids: Integers) -> NDArray[np.float64]:
    """Standard Gumbel noise between MIN_NOISE and MAX_NOISE; arguments are broadcast together."""
    noise = _as_fraction(_uniform_bits(keys, token_ids), np.float64)
    for _ in range(2):
        np.negative(np.log(noise, out=noise), out=noise)
    return noise


def _bits(integers: Integers) -> Bits:
    return integers.view(np.uint64)


def _as_fraction(bits: Bits, dtype: Any) -> NDArray[Any]:
    fraction = bits.astype(dtype)
    fraction += dtype(0.5)
    fraction *= dtype(2.0**-_UNIFORM_BITS)
    return fraction


def _uniform_bits(keys: Bits, token_ids: Integers) -> Bits:
    return _mix(keys + (_bits(token_ids) + _ONE) * _GOLDEN) >> np.uint64(64 - _UNIFORM_BITS)


def _mix(state: Bits) -> Bits:
    state = state ^ (state >> np.uint64(30))
    state *= _MIX_1
    state ^= state >> np.uint64(27)
    state *= _MIX_2
    state ^= state >> np.uint64(31)
    return state
