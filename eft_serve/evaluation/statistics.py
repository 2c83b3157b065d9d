"""Shares, differences and ratios with 95 % confidence intervals. Knows numbers, not what they measure.

Shares have Wilson intervals. Everything else is a function of column sums over independent units (questions, answers)
and has the percentile interval of a seeded bootstrap that draws whole units, so that columns of one unit stay paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959964  # of 95 %
RESAMPLES = 4000
SEED = 0

Column = NDArray[np.float64]  # [num_units]


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def share(flags: Column) -> Estimate:
    """The share of flags (0 or 1) that are set; Wilson's interval."""
    total = len(flags)
    if not total:
        raise ValueError("flags: none; a share needs at least one")
    part = float(flags.mean())
    spread = Z * math.sqrt(part * (1 - part) / total + Z**2 / (4 * total**2))
    shrunk = part + Z**2 / (2 * total)
    scale = 1 + Z**2 / total
    return Estimate(part, max(0.0, (shrunk - spread) / scale), min(1.0, (shrunk + spread) / scale))


def difference(ours: Column, theirs: Column) -> Estimate:
    """The mean of ours less the mean of theirs, unit by unit."""
    return _bootstrap([ours, theirs, np.ones_like(ours)], lambda s: (s[0] - s[1]) / s[2])


def normalised(column: Column, zero: Column, one: Column) -> Estimate | None:
    """Where the mean lies between that of `zero` (0) and that of `one` (1).

    None when the interval of the gap between the two includes 0: there is nothing to divide by.
    """
    if difference(one, zero).low <= 0:
        return None
    return _bootstrap([column, zero, one], lambda s: (s[0] - s[1]) / (s[2] - s[1]))


def ratio(numerators: Column, denominators: Column) -> Estimate:
    """The sum of the numerators over that of the denominators, e.g. accepted tokens over all tokens, by answer."""
    return _bootstrap([numerators, denominators], lambda s: s[0] / s[1])


def perplexity(nats: Column, num_tokens: Column) -> Estimate:
    """exp of the mean negative log-likelihood of a token; units are answers."""
    return _bootstrap([nats, num_tokens], lambda s: np.exp(s[0] / s[1]))


def perplexity_ratio(ours: Column, theirs: Column, num_tokens: Column) -> Estimate:
    """Our perplexity over theirs on the same answers; arguments as in `perplexity`."""
    return _bootstrap([ours, theirs, num_tokens], lambda s: np.exp((s[0] - s[1]) / s[2]))


def _bootstrap(columns: Sequence[Column], statistic: Callable[[Column], Column]) -> Estimate:
    """`statistic` maps column sums [num_columns, num_samples] to values [num_samples]."""
    table = np.stack(columns)  # [num_columns, num_units]
    num_units = table.shape[1]
    if not num_units:
        raise ValueError("columns: no unit to draw from")
    counts = np.random.default_rng(SEED).multinomial(num_units, np.full(num_units, 1 / num_units), RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have no gap at all
        values = statistic(table @ counts.T)
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Estimate(float(statistic(table.sum(axis=1, keepdims=True))[0]), float(low), float(high))
