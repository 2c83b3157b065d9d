"""The combined logits of rows, compiled for a CPU; knows arrays and addresses only.

Every logit is read once, in place and in its own dtype, in blocks that fit the first-level cache.
"""

from __future__ import annotations

import numpy as np
from numba import carray  # type: ignore[attr-defined]
from numpy.typing import NDArray

from eft_serve.numerics.kernels.bits import (
    Floats,
    Integers,
    compiled,
    float32_at,
    magnitude,
    uint16_at,
    widen_bfloat16,
    widen_float16,
)

BLOCK = 2048  # columns at a time: a few arrays of this many float32 fit the first-level cache

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # dtype of the logits
FINE, NOT_A_NUMBER, OVERFLOW, NOTHING_POSSIBLE = 0, 1, 2, 3  # status of a row

_INFINITE = np.int32(0x7F800000)  # the magnitude of an infinity; NaN's are larger


@compiled
def combine_rows(
    addresses: Integers,
    kinds: NDArray[np.int8],
    coefficients: Floats,
    starts: Integers,
    widths: Integers,
    out: Floats,
    status: Integers,
) -> None:
    """out[row] = Σ_t coefficients[t] · term t, over the terms `starts[row]` to `starts[row + 1]` of the flat arrays.

    A token is impossible (−inf) if it is so for any running term; a term of coefficient 0 contributes nothing.

    Args:
        addresses: [num_terms of all rows], where each term's row begins in memory.
        kinds: the same, FLOAT32, BFLOAT16 or FLOAT16.
        coefficients: the same.
        starts: [num_rows + 1].
        widths: [num_rows], columns.
        out: [num_rows, at least the largest width], written.
        status: [num_rows, 2], written: FINE or the fault, and the flat index of the faulty term.
    """
    for row in range(len(widths)):
        worst = np.int32(0)
        width = widths[row]
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            is_first = True
            for term in range(starts[row], starts[row + 1]):
                if coefficients[term] != 0:
                    _add(addresses[term], kinds[term], coefficients[term], start, is_first, out[row, start:stop])
                    is_first = False
            if is_first:  # no term runs
                out[row, start:stop] = 0
            size = _largest_magnitude(out[row, start:stop])
            worst = size if size > worst else worst
        status[row, 0], status[row, 1] = FINE, -1
        if worst >= _INFINITE:
            _combine_with_care(
                addresses[starts[row] : starts[row + 1]],
                kinds[starts[row] : starts[row + 1]],
                coefficients[starts[row] : starts[row + 1]],
                out[row, :width],
                status[row],
            )
            status[row, 1] += starts[row]


@compiled
def _add(address: int, kind: int, coefficient: np.float32, start: int, is_first: bool, out: Floats) -> None:
    """out += coefficient · term, or = for the first; multiply and add are rounded separately.

    Args:
        address, kind: of the term's row.
        start: column of the first.
        out: a block of the row.
    """
    if kind == FLOAT32:
        floats = carray(float32_at(address + start * 4), len(out))
        if is_first:
            for i in range(len(out)):
                out[i] = floats[i] * coefficient
        else:
            for i in range(len(out)):
                out[i] += floats[i] * coefficient
        return
    halves = carray(uint16_at(address + start * 2), len(out))
    if is_first:
        out[:] = 0
    if kind == BFLOAT16:
        for i in range(len(out)):
            out[i] += widen_bfloat16(halves[i]) * coefficient
    else:
        for i in range(len(out)):
            out[i] += widen_float16(halves[i]) * coefficient


@compiled
def _largest_magnitude(block: Floats) -> np.int32:
    worst = np.int32(0)
    for i in range(len(block)):
        size = magnitude(block[i])
        worst = size if size > worst else worst
    return worst


@compiled
def _number(address: int, kind: int, i: int) -> np.float32:
    if kind == FLOAT32:
        return carray(float32_at(address), i + 1)[i]
    half = carray(uint16_at(address), i + 1)[i]
    return widen_bfloat16(half) if kind == BFLOAT16 else widen_float16(half)


@compiled
def _combine_with_care(
    addresses: Integers, kinds: NDArray[np.int8], coefficients: Floats, out: Floats, status: Integers
) -> None:
    """Combine a row with any values; bit for bit as `combine_rows` where all values are finite."""
    is_possible = False
    for i in range(len(out)):
        total, is_impossible, is_first = np.float32(0), False, True
        for term in range(len(addresses)):
            if coefficients[term] != 0:
                number = _number(addresses[term], kinds[term], i)
                if number == -np.inf:
                    is_impossible = True
                    continue
                if not number < np.inf:
                    status[0], status[1] = NOT_A_NUMBER, term
                    return
                part = number * coefficients[term]
                total = part if is_first else total + part
                is_first = False
        if not is_impossible and magnitude(total) >= _INFINITE:
            status[0] = OVERFLOW
            return
        is_possible |= not is_impossible
        out[i] = np.float32(-np.inf) if is_impossible else total
    if not is_possible:
        status[0] = NOTHING_POSSIBLE
