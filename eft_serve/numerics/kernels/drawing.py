"""Sampling of tokens from rows of combined logits, compiled for a CPU; knows arrays only.

Plain loops over blocks, which the compiler vectorises. A row's token depends only on the row, so threads may share a
batch. The tokens are the same as those of `device_sampling`, in torch: every operation is rounded separately, and mass
is counted in integers, whose sums are the same in any order.
"""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import NDArray

from eft_serve.numerics import exponential
from eft_serve.numerics.kernels.bits import (
    Floats,
    Integers,
    as_float,
    compiled,
    from_order_key,
    order_key,
    times_power,
)
from eft_serve.numerics.keyed_noise import GOLDEN, MIX_1, MIX_2

BLOCK = 2048  # columns at a time: they fit the first-level cache
LANE = 64  # columns that one test can skip

# Keyed noise; see `keyed_noise`.

_S12, _S27, _S30, _S31, _S40 = (np.uint64(n) for n in (12, 27, 30, 31, 40))
_HALF, _UNIT = 0.5, 2.0**-52
_TAIL_UNIT = np.float32(2.0**-24)


@compiled
def _hash(key: np.uint64, token_id: int) -> np.uint64:
    state = key + np.uint64(token_id + 1) * GOLDEN
    state = (state ^ (state >> _S30)) * MIX_1
    state = (state ^ (state >> _S27)) * MIX_2
    return state ^ (state >> _S31)


@compiled
def _gumbel(bits: np.uint64) -> float:
    return -log(-log((np.float64(bits >> _S12) + _HALF) * _UNIT))


@compiled
def _tail(bits: np.uint64) -> np.float32:
    """The probability that uniform noise exceeds this one, rounded down to 24 bits."""
    return np.float32(np.int32(~bits >> _S40)) * _TAIL_UNIT


_PER_LOG_2 = np.float32(exponential.PER_LOG_2)
_LEAST_POWER, _LARGEST_POWER = np.float32(-126), np.float32(1)
_BIAS, _MANTISSA = np.float32(127), np.float32(1 << 23)
_SLACK = np.float32(4096)  # of 2^23: more than float32's error in a relevant exponent


@compiled
def _reach(behind: np.float32) -> np.float32:
    """At least exp(behind): 2^n · (1 + f) instead of 2^(n + f), which is larger, plus a margin."""
    power = behind * _PER_LOG_2
    power = _LEAST_POWER if power < _LEAST_POWER else power
    power = _LARGEST_POWER if power > _LARGEST_POWER else power
    return as_float(np.int32((power + _BIAS) * _MANTISSA + _SLACK))


_C7, _C6, _C5, _C4, _C3, _C2 = (np.float32(term) for term in exponential.TAYLOR)
_ONE, _LEAST = np.float32(1), np.float32(exponential.LEAST)
_LOG_2_HIGH, _LOG_2_LOW = np.float32(exponential.LOG_2_HIGH), np.float32(exponential.LOG_2_LOW)
_NO_FRACTIONS = np.float32(exponential.NO_FRACTIONS)
_MASS_UNITS = np.float32(1 << exponential.MASS_BITS)


@compiled
def _power(x: np.float32) -> np.float32:
    """exp(x) of x ≤ 0, or of −87 where x is less."""
    x = _LEAST if x < _LEAST else x
    y = x * _PER_LOG_2 + _NO_FRACTIONS
    n = y - _NO_FRACTIONS
    r = x - n * _LOG_2_HIGH - n * _LOG_2_LOW
    p = _C7 * r + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    return times_power(p * r * r + r + _ONE, y)


@compiled
def _mass(x: np.float32) -> np.int64:
    """exp(x) of x ≤ 0 in units of 2⁻⁴⁰; no mass for less than that."""
    return np.int64(_power(x) * _MASS_UNITS)


# Drawing.


@compiled
def sample_rows(
    logits: Floats,
    widths: Integers,
    temperature: Floats,
    top_k: Integers,
    top_p: Floats,
    log_min_p: Floats,
    keys: NDArray[np.uint64],
    token_ids: Integers,
) -> None:
    """The token of each row: the most likely one at temperature 0, else sampled with the noise of its key.

    Args:
        logits: [num_rows, at least the largest width], finite or −inf, at least one finite in each row.
        widths: [num_rows], columns.
        temperature, top_k, top_p, log_min_p: [num_rows]; 0, 0, 1 and −inf for none.
        keys: [num_rows], of the noise.
        token_ids: [num_rows], written.
    """
    values = np.empty(logits.shape[1], np.float32)
    ids = np.empty(logits.shape[1], np.int32)
    for row in range(len(widths)):
        numbers = logits[row, : widths[row]]
        best = _most_likely(numbers)
        if temperature[row] > 0:
            peak = numbers[best]
            if top_k[row] == 0 and top_p[row] == 1 and log_min_p[row] == -np.inf:
                best = _draw(numbers, peak, temperature[row], keys[row], best)
            else:
                k = top_k[row] if top_k[row] < len(numbers) else 0
                best = _draw_filtered(
                    numbers, peak, temperature[row], k, top_p[row], log_min_p[row], keys[row], best, values, ids
                )
        token_ids[row] = best


@compiled
def _most_likely(numbers: Floats) -> int:
    """The lowest id of the largest logit."""
    highest, at = np.int32(-0x7FFFFFFF), 0
    for start in range(0, len(numbers), BLOCK):
        top = _highest_key(numbers[start : start + BLOCK])
        if top > highest:
            highest, at = top, start
    value = from_order_key(highest)
    while numbers[at] != value and at < len(numbers) - 1:  # NaN equals nothing
        at += 1
    return at


@compiled
def _highest_key(block: Floats) -> np.int32:
    top = np.int32(-0x7FFFFFFF)
    for i in range(len(block)):
        key = order_key(block[i] + np.float32(0))  # −0 is 0
        top = key if key > top else top
    return top


@compiled
def _draw(numbers: Floats, peak: np.float32, temperature: np.float32, key: np.uint64, top: int) -> int:
    """The largest (number − peak) / temperature + noise; few tokens can have it, so few need a logarithm.

    Noise of at least x has the upper tail 1 − exp(−exp(−x)) < exp(−x), so only a token whose tail is at most
    exp(its logit − the best score so far) can win.
    """
    winner, best = top, _gumbel(_hash(key, top))
    for start in range(0, len(numbers), LANE):
        lane = numbers[start : start + LANE]
        if not _may_win(lane, start, peak, temperature, key, np.float32(best)):
            continue
        for i in range(len(lane)):
            x = (lane[i] - peak) / temperature
            bits = _hash(key, start + i)
            if _tail(bits) <= _reach(x - np.float32(best)):
                score = np.float64(x) + _gumbel(bits)
                if score > best or (score == best and start + i < winner):
                    winner, best = start + i, score
    return winner


@compiled
def _may_win(
    lane: Floats, start: int, peak: np.float32, temperature: np.float32, key: np.uint64, bar: np.float32
) -> bool:
    """Whether a token of the lane may reach the score `bar`."""
    count = np.int32(0)
    for i in range(len(lane)):
        x = (lane[i] - peak) / temperature
        count |= np.int32(_tail(_hash(key, start + i)) <= _reach(x - bar))
    return count != 0


@compiled
def _draw_filtered(
    numbers: Floats,
    peak: np.float32,
    temperature: np.float32,
    top_k: int,
    top_p: np.float32,
    log_min_p: np.float32,
    key: np.uint64,
    top: int,
    values: Floats,
    ids: NDArray[np.int32],
) -> int:
    """As `_draw`, among the tokens that top-k, then top-p of the rest, and min-p keep."""
    count, threshold = 0, log_min_p
    if top_k > 0:
        cutoff = _FIRST_CUTOFF
        while True:
            count = _gather(numbers, peak, temperature, cutoff, values, ids)
            if count >= top_k or cutoff == -np.inf:
                break
            cutoff = _next_cutoff(cutoff)
        if count == 0:  # all are NaN
            return top
        kth = _least_kept(values[:count].copy(), np.ones(count, np.int64), np.float64(top_k))
        count = _keep(values, ids, count, kth)
        threshold = kth if kth > threshold else threshold
    if top_p < 1:
        if top_k > 0:
            masses = _masses(values[:count])
            target = np.float64(top_p) * np.float64(masses.sum())
        else:
            target = np.float64(top_p) * np.float64(_total_mass(numbers, peak, temperature))
            masses, cutoff = np.zeros(0, np.int64), _FIRST_CUTOFF
            while True:
                count = _gather(numbers, peak, temperature, cutoff, values, ids)
                masses = _masses(values[:count])
                if (count > 0 and np.float64(masses.sum()) >= target) or cutoff == -np.inf:
                    break
                cutoff = _next_cutoff(cutoff)
            if count == 0:
                return top
        nucleus = _least_kept(values[:count].copy(), masses, target)
        threshold = nucleus if nucleus > threshold else threshold
    elif top_k == 0:
        count = _gather(numbers, peak, temperature, threshold, values, ids)
    winner, best = top, _gumbel(_hash(key, top))
    for i in range(count):
        if values[i] >= threshold:
            bits = _hash(key, ids[i])
            if _tail(bits) <= _reach(values[i] - np.float32(best)):
                score = np.float64(values[i]) + _gumbel(bits)
                if score > best or (score == best and ids[i] < winner):
                    winner, best = ids[i], score
    return winner


_FIRST_CUTOFF = np.float32(-4)  # of tempered logits: less likely than the most likely token by a factor of 55


@compiled
def _next_cutoff(cutoff: np.float32) -> np.float32:
    """Twice as far down; at the last step all the way."""
    return cutoff * np.float32(2) if cutoff > _LEAST else np.float32(-np.inf)


@compiled
def _gather(
    numbers: Floats,
    peak: np.float32,
    temperature: np.float32,
    cutoff: np.float32,
    values: Floats,
    ids: NDArray[np.int32],
) -> int:
    """Collect the tempered logits that reach the cutoff, with their ids, in order; returns how many."""
    count = 0
    for start in range(0, len(numbers), LANE):
        lane = numbers[start : start + LANE]
        if _reaches(lane, peak, temperature, cutoff):
            for i in range(len(lane)):
                x = (lane[i] - peak) / temperature
                if x >= cutoff:
                    values[count], ids[count] = x, start + i
                    count += 1
    return count


@compiled
def _reaches(lane: Floats, peak: np.float32, temperature: np.float32, cutoff: np.float32) -> bool:
    found = np.int32(0)
    for i in range(len(lane)):
        found |= np.int32((lane[i] - peak) / temperature >= cutoff)
    return found != 0


@compiled
def _total_mass(numbers: Floats, peak: np.float32, temperature: np.float32) -> np.int64:
    mass = np.int64(0)
    for start in range(0, len(numbers), BLOCK):
        mass += _mass_of(numbers[start : start + BLOCK], peak, temperature)
    return mass


@compiled
def _mass_of(block: Floats, peak: np.float32, temperature: np.float32) -> np.int64:
    mass = np.int64(0)
    for i in range(len(block)):
        mass += _mass((block[i] - peak) / temperature)
    return mass


@compiled
def _keep(values: Floats, ids: NDArray[np.int32], count: int, threshold: np.float32) -> int:
    """Keep those that reach the threshold, in place; returns how many."""
    kept = 0
    for i in range(count):
        if values[i] >= threshold:
            values[kept], ids[kept] = values[i], ids[i]
            kept += 1
    return kept


@compiled
def _masses(values: Floats) -> Integers:
    masses = np.empty(len(values), np.int64)
    for i in range(len(values)):
        masses[i] = _mass(values[i])
    return masses


@compiled
def _least_kept(values: Floats, masses: Integers, target: float) -> np.float32:
    """The smallest value such that all larger ones together have less mass than the target; the largest if none.

    A weighted quickselect, linear for any order of the values: pivots are at hashed places, since any fixed choice is
    quadratic for some order. Both arrays are shuffled.
    """
    start, stop, above, round_ = 0, len(values), np.int64(0), 0
    least = values.max()
    while start < stop:
        width = np.uint64(stop - start)
        a = values[start + np.int64(_hash(GOLDEN, round_) % width)]
        b = values[start + np.int64(_hash(GOLDEN, round_ + 1) % width)]
        c = values[start + np.int64(_hash(GOLDEN, round_ + 2) % width)]
        round_ += 3
        pivot = max(min(a, b), min(max(a, b), c))
        i, larger, end = start, start, stop  # [start, larger): larger, [larger, i): equal, [end, stop): smaller
        mass_larger, mass_equal = np.int64(0), np.int64(0)
        while i < end:
            if values[i] > pivot:
                mass_larger += masses[i]
                values[i], values[larger] = values[larger], values[i]
                masses[i], masses[larger] = masses[larger], masses[i]
                larger += 1
                i += 1
            elif values[i] < pivot:
                end -= 1
                values[i], values[end] = values[end], values[i]
                masses[i], masses[end] = masses[end], masses[i]
            else:
                mass_equal += masses[i]
                i += 1
        if not np.float64(above + mass_larger) < target:
            stop = larger
            continue
        least = pivot
        above += mass_larger + mass_equal
        start = i
    return least
