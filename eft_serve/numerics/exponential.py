"""exp(x) = 2ⁿ · exp(r) with |r| ≤ log(2) / 2: constants with which torch and compiled code compute the same bits.

Both round every product and sum separately, in float32 and in this order.
"""

from __future__ import annotations

from math import factorial, log

LEAST = -87.0  # exp of less is not a normal float32, and negligible
PER_LOG_2 = 1 / log(2)
LOG_2_HIGH, LOG_2_LOW = 355 / 512, log(2) - 355 / 512  # the first times n is exact
NO_FRACTIONS = float(3 << 22)  # around which float32 has no fractions
TAYLOR = tuple(1 / factorial(k) for k in range(7, 1, -1))  # of r⁷ down to r²
MASS_BITS = 40  # mass is counted in units of 2⁻⁴⁰
