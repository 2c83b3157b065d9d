"""The EFT combination (arXiv 2310.12962, eq. 5): several models' logits become one; knows nothing of sampling.

Raw logits are enough: a model's log-softmax would subtract one constant per row, which normalising removes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def combine(logits: Tensor | Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Σ_t coefficients[t, row] · logits[t][row], [num_rows, vocab_size] float32, not normalised.

    A token is impossible (−inf) if it is so for any term with a non-zero coefficient. A term contributes nothing,
    whatever its logits, to the rows where its coefficient is 0.

    Args:
        logits: num_terms times [num_rows, vocab_size], floating; padding of the output heads is already cut or masked.
        coefficients: [num_terms, num_rows], finite.

    Raises:
        ValueError: shapes differ, a running term has NaN or +inf, or a row has no possible token.
    """
    _check_shapes(logits, coefficients)
    factors = coefficients.to(device=logits[0].device, dtype=torch.float32)
    total = _accumulate(logits, factors)
    # NaN and infinities survive any further addition, so a row with a finite total has none.
    doubtful = [row for row, value in enumerate(total.sum(dim=-1).tolist()) if not math.isfinite(value)]
    if doubtful:
        total[doubtful] = _with_care([logits[t][doubtful] for t in range(len(logits))], factors[:, doubtful], doubtful)
    return total


def _check_shapes(logits: Tensor | Sequence[Tensor], coefficients: Tensor) -> None:
    if len(logits) == 0:
        raise ValueError("logits: no term; give at least one")
    shape = logits[0].shape
    for term in range(len(logits)):
        if logits[term].shape != shape:
            raise ValueError(
                f"logits: term {term} is {tuple(logits[term].shape)} and term 0 is {tuple(shape)}; "
                "cut all to the same rows and the same real vocabulary"
            )
    if coefficients.shape != (len(logits), shape[0]):
        raise ValueError(
            f"coefficients: {tuple(coefficients.shape)} for {len(logits)} terms of {shape[0]} rows; "
            "give one for every term and row"
        )
    if not np.isfinite(coefficients.numpy(force=True)).all():  # ten times faster than torch for so few
        raise ValueError("coefficients: NaN or infinite; give finite numbers")


def _accumulate(logits: Tensor | Sequence[Tensor], factors: Tensor) -> Tensor:
    """Σ_t factors[t, row] · logits[t][row], without checks.

    Multiply and add are rounded separately, not fused: a row's bits must not depend on its place in the batch. Where
    all factors are ±1 the multiplication is skipped, and the bits are the same.
    """
    total = out = torch.empty(logits[0].shape, dtype=torch.float32, device=logits[0].device)
    for term, signs in enumerate(map(set, factors.tolist())):
        rows, sign = logits[term].float() if term == 0 else logits[term], 1
        if signs == {-1.0} and term > 0:
            sign = -1
        elif signs != {1.0}:
            rows = rows * factors[term, :, None]
        total = rows if term == 0 else torch.add(total, rows, alpha=sign, out=out)
    return total if total is out else out.copy_(total)


def _with_care(logits: Sequence[Tensor], factors: Tensor, row_ids: Sequence[int]) -> Tensor:
    """The combination of rows with any values; bit for bit as `_accumulate` where all values are finite."""
    impossible = torch.zeros(logits[0].shape, dtype=torch.bool, device=logits[0].device)
    possible = []
    for term, (rows, factor) in enumerate(zip(logits, factors, strict=True)):
        running = rows.float().where((factor != 0)[:, None] | rows.isfinite(), 0.0)  # 0 · inf is NaN
        if (bad := (running.isnan() | running.isposinf()).any(dim=-1)).any():
            raise ValueError(f"logits: term {term} has NaN or +inf in rows {_chosen(row_ids, bad)}")
        impossible |= running.isneginf()
        possible.append(running.masked_fill(running.isneginf(), 0.0))  # adding another −inf could give NaN
    total = _accumulate(possible, factors)
    if not total.isfinite().all():
        raise ValueError("coefficients: the combination overflows float32; use smaller ones")
    if (empty := impossible.all(dim=-1)).any():
        raise ValueError(f"logits: no token is possible in rows {_chosen(row_ids, empty)}")
    return total.masked_fill_(impossible, -torch.inf)


def _chosen(row_ids: Sequence[int], mask: Tensor) -> list[int]:
    return [row for row, chosen in zip(row_ids, mask.tolist(), strict=True) if chosen]
