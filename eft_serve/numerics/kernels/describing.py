"""The most likely tokens of rows of logits and their normalisers, compiled for a CPU; knows arrays only."""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import NDArray

from eft_serve.numerics.kernels.bits import Floats, Integers, compiled
from eft_serve.numerics.kernels.drawing import (
    _FIRST_CUTOFF,
    BLOCK,
    _gather,
    _keep,
    _least_kept,
    _most_likely,
    _next_cutoff,
    _power,
)

_ONE = np.float32(1)


@compiled
def _exponentials(block: Floats, peak: np.float32, out: Floats) -> None:
    for i in range(len(block)):
        out[i] = _power(block[i] - peak)


def _sum_of(block: Floats) -> np.float32:
    total = np.float32(0)
    for i in range(len(block)):
        total += block[i]
    return total


_sum = compiled(_sum_of, fastmath={"reassoc", "nsz"})  # in any order, so that it is vectorised


@compiled
def _normaliser(numbers: Floats, peak: np.float32, buffer: Floats) -> float:
    """log Σ exp(number)"""
    total = 0.0
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK]
        _exponentials(block, peak, buffer)
        total += np.float64(_sum(buffer[: len(block)]))
    return np.float64(peak) + log(total)


@compiled
def describe_rows(logits: Floats, width: int, top: Integers, normalisers: NDArray[np.float64]) -> None:
    """The most likely tokens of each row, and log Σ exp over its columns.

    Args:
        logits: [num_rows, at least width], finite or −inf, at least one finite in each row.
        width: columns.
        top: [num_rows, num_top], written: token ids, the most likely first, the lowest id first of equals.
        normalisers: [num_rows], written; their error is below 1e-6.
    """
    num_top = top.shape[1]
    values = np.empty(width, np.float32)
    ids = np.empty(width, np.int32)
    buffer = np.empty(BLOCK, np.float32)
    for row in range(len(logits)):
        numbers = logits[row, :width]
        peak = numbers[_most_likely(numbers)]
        normalisers[row] = _normaliser(numbers, peak, buffer)
        if num_top == 0:
            continue
        count, cutoff = 0, _FIRST_CUTOFF
        while True:
            count = _gather(numbers, peak, _ONE, cutoff, values, ids)
            if count >= num_top or cutoff == -np.inf:
                break
            cutoff = _next_cutoff(cutoff)
        kth = _least_kept(values[:count].copy(), np.ones(count, np.int64), np.float64(num_top))
        count = _keep(values, ids, count, kth)
        for i in range(count):  # relative to the peak, close ones were rounded to the same
            values[i] = numbers[ids[i]]
        for place in range(num_top):
            best = place
            for i in range(place + 1, count):  # in the order of ids, so that the first of equals has the lowest
                if values[i] > values[best] or (values[i] == values[best] and ids[i] < ids[best]):
                    best = i
            values[place], values[best] = values[best], values[place]
            ids[place], ids[best] = ids[best], ids[place]
            top[row, place] = ids[place]
