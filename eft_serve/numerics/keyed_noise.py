"""Gumbel noise as a pure function of (seed, position, token id); knows nothing of batches or distributions.

A counter-based generator (SplitMix64's finaliser, Steele et al. 2014) in wrapping int64 arithmetic: no state, so the
same triple gives the same noise on any device, in any batch, whichever other tokens survive.
"""

from __future__ import annotations

import math

from torch import Tensor


def to_int64(value: int) -> int:
    """The signed number with the same low 64 bits, as an int64 tensor can hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = to_int64(0x9E3779B97F4A7C15)
_MIX_1 = to_int64(0xBF58476D1CE4E5B9)
_MIX_2 = to_int64(0x94D049BB133111EB)
_UNIFORM_BITS = 52  # (bits + ½) · 2⁻⁵² is exact in float64 and never 0 or 1

MAX_NOISE = -math.log(-math.log1p(-(2.0**-53)))  # 36.7
MIN_NOISE = -math.log(53 * math.log(2.0))  # −3.6


def row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """One 64-bit key for each (seed, position); all int64 [num_rows]."""
    return _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)


def separate(seeds: Tensor, purpose: int) -> Tensor:
    """Seeds, int64 [num_rows], whose noise is independent of that of the originals and of every other purpose's."""
    return _mix(_mix(seeds + to_int64(purpose * _MIX_1)) ^ _MIX_2)


def uniform(keys: Tensor) -> Tensor:
    """Uniform on (0, 1), float64, the shape of `keys`; not independent of `gumbel` for the same keys."""
    return _uniform_bits(keys, keys.new_zeros(())).double().add_(0.5).mul_(2.0**-_UNIFORM_BITS)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, between MIN_NOISE and MAX_NOISE; int64 arguments are broadcast together."""
    return _uniform_bits(keys, token_ids).double().add_(0.5).mul_(2.0**-_UNIFORM_BITS).log_().neg_().log_().neg_()


def upper_tail(keys: Tensor, token_ids: Tensor) -> Tensor:
    """How likely Gumbel noise is to exceed that of `gumbel`, float32; costs no logarithm."""
    complement = _uniform_bits(keys, token_ids).bitwise_xor_((1 << _UNIFORM_BITS) - 1)
    return complement.float().add_(0.5).mul_(2.0**-_UNIFORM_BITS)


def _uniform_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    return _shift_right(_mix(keys + (token_ids + 1) * _GOLDEN), 64 - _UNIFORM_BITS)


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift_right(state, 30)).mul_(_MIX_1)
    state = state.bitwise_xor_(_shift_right(state, 27)).mul_(_MIX_2)
    return state.bitwise_xor_(_shift_right(state, 31))


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical: int64's own shift copies the sign."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)
