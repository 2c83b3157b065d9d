"""Attention straight from the blocks of the cache, compiled for the CPU that it runs on; knows arrays only.

With one new token a row the whole work is to read the keys and values once, so every block is read in place:
nothing is gathered, copied or padded. A row's bits depend neither on its neighbours nor on how many of its tokens are
new. On an AMD core, 16 rows of 40 to 600 tokens over 4 layers of 6 heads of 32 (35 MB) take 3.3 ms, torch's kernel on
contiguous sequences 4.9 ms, and only reading the memory 2.5 ms.
"""

from __future__ import annotations

from functools import partial
from math import factorial, log

import numpy as np
from numpy.typing import NDArray

from eft_serve.numerics.kernels.bits import compiled

Floats = NDArray[np.float32]
Bits = NDArray[np.int32]
Indices = NDArray[np.int64]

# Not with `nnan` and `ninf`: a broken model must be seen to be broken.
_compiled = partial(compiled, fastmath={"reassoc", "contract", "arcp", "nsz"})


@_compiled
def attend(
    query: Floats,
    keys: Floats,
    values: Floats,
    tables: Indices,
    lengths: Indices,
    window: int,
    scaling: float,
    out: Floats,
) -> None:
    """Causal attention of rows with equally many new tokens each, the last ones of their sequences.

    Args:
        query: [num_rows * q_length, heads, key_dim], one row after the other; this and all others contiguous.
        keys: [num_blocks, kv_heads, block_size, key_dim], the new tokens' own included; block_size a multiple of 4.
            What follows a sequence's end in its last block must be finite.
        values: [num_blocks, kv_heads, block_size, value_dim].
        tables: [num_rows, most blocks], each row's blocks in order.
        lengths: [num_rows], tokens of each row, cached and new.
        window: tokens that a query sees, itself included.
        scaling: of the scores.
        out: [num_rows * q_length, heads, value_dim], written.
    """
    q_length, block_size = len(query) // len(lengths), keys.shape[2]
    scores = np.empty((query.shape[1], q_length, tables.shape[1] * block_size), np.float32)
    rounded = np.empty(scores.shape[2], np.float32)
    for row in range(len(lengths)):
        length, tokens = lengths[row], slice(row * q_length, (row + 1) * q_length)
        first, last = max(0, length - q_length - window + 1) // block_size, (length - 1) // block_size
        _score(query[tokens], keys, tables[row], first, last, scores)
        for head in range(len(scores)):
            for i in range(q_length):
                stop = length - q_length + i + 1
                start = max(0, stop - window)
                _softmax(scores[head, i, start:stop], np.float32(scaling), rounded)
                scores[head, i, first * block_size : start] = 0
                scores[head, i, stop : (last + 1) * block_size] = 0
        _weigh(scores, values, tables[row], first, last, out[tokens])


@_compiled
def _score(query: Floats, keys: Floats, table: Indices, first: int, last: int, scores: Floats) -> None:
    """scores[head, i, t] = query[i, head] · key of token t, of the tokens in the blocks `first` to `last` of a row."""
    repeats = query.shape[1] // keys.shape[1]
    for j in range(first, last + 1):
        block = np.uint64(table[j])  # unsigned: no check for a negative one
        for head in range(query.shape[1]):
            kv = head // repeats
            for i in range(query.shape[0]):
                for t in range(0, keys.shape[2], 4):  # independent sums, and what they share is read once
                    a = b = c = d = np.float32(0)
                    for x in range(keys.shape[3]):
                        q = query[i, head, x]
                        a += q * keys[block, kv, t, x]
                        b += q * keys[block, kv, t + 1, x]
                        c += q * keys[block, kv, t + 2, x]
                        d += q * keys[block, kv, t + 3, x]
                    at = j * keys.shape[2] + t
                    scores[head, i, at] = a
                    scores[head, i, at + 1] = b
                    scores[head, i, at + 2] = c
                    scores[head, i, at + 3] = d


@_compiled
def _weigh(scores: Floats, values: Floats, table: Indices, first: int, last: int, out: Floats) -> None:
    """out[i, head] = Σ_t scores[head, i, t] · value of token t, of the same tokens."""
    repeats = out.shape[1] // values.shape[1]
    out[:] = 0
    for j in range(first, last + 1):
        block = np.uint64(table[j])
        for head in range(out.shape[1]):
            kv = head // repeats
            for i in range(out.shape[0]):
                for t in range(0, values.shape[2], 4):
                    at = j * values.shape[2] + t
                    a, b = scores[head, i, at], scores[head, i, at + 1]
                    c, d = scores[head, i, at + 2], scores[head, i, at + 3]
                    for x in range(values.shape[3]):
                        out[i, head, x] += (
                            a * values[block, kv, t, x]
                            + b * values[block, kv, t + 1, x]
                            + c * values[block, kv, t + 2, x]
                            + d * values[block, kv, t + 3, x]
                        )


@_compiled
def _softmax(scores: Floats, scaling: np.float32, rounded: Floats) -> None:
    """Of scores · scaling, in place; `rounded` is room to work in."""
    highest = scores[0]
    for score in scores:
        highest = score if score > highest else highest  # `max` handles NaN and takes ten times as long
    _exponentials(scores, highest, scaling, rounded)
    _times_powers(scores.view(np.int32), rounded.view(np.int32))
    total = np.float32(0)
    for score in scores:
        total += score
    share = np.float32(1) / total
    for t in range(len(scores)):
        scores[t] *= share


# exp(x) = 2^n · exp(r) with |r| ≤ log(2) / 2: Taylor's coefficients, log(2) in two parts of which the first times n is
# exact, and the number in whose neighbourhood float32 has no fractions. `np.exp` is a call for every single number.
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / factorial(k)) for k in range(2, 8))
_ONE = np.float32(1)
_LOG_2_HIGH, _LOG_2_LOW = np.float32(355 / 512), np.float32(log(2) - 355 / 512)
_PER_LOG_2 = np.float32(1 / log(2))
_NO_FRACTIONS = np.float32(3 << 22)
_LEAST = np.float32(-87)  # exp of less is no normal float32, and next to nothing
_MANTISSA_BITS = np.int32(23)


@partial(compiled, fastmath={"contract"})  # in this order: `_NO_FRACTIONS` would cancel out
def _exponentials(scores: Floats, highest: np.float32, scaling: np.float32, rounded: Floats) -> None:
    """exp(r) of x = (score - highest) · scaling, in place, and n in the lowest bits of `rounded`. NaN stays NaN."""
    for t in range(len(scores)):
        x = (scores[t] - highest) * scaling
        x = _LEAST if x < _LEAST else x
        y = x * _PER_LOG_2 + _NO_FRACTIONS
        n = y - _NO_FRACTIONS
        r = x - n * _LOG_2_HIGH - n * _LOG_2_LOW
        p = _C7
        p = p * r + _C6
        p = p * r + _C5
        p = p * r + _C4
        p = p * r + _C3
        p = p * r + _C2
        scores[t] = p * r * r + r + _ONE
        rounded[t] = y


@_compiled
def _times_powers(bits: Bits, exponents: Bits) -> None:
    """Numbers times 2^n, by adding n to their exponents."""
    for t in range(len(bits)):
        bits[t] += exponents[t] << _MANTISSA_BITS
