"""The EFT combination (arXiv 2310.12962, eq. 5): several models' logits become one; knows nothing of drawing.

Raw logits are enough: what a model's log-softmax would subtract is one constant a row, which normalising takes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def coefficients(scale: float, weights: Sequence[float]) -> list[float]:
    """Coefficients of `ref + scale·(base − ref) + Σ weightᵢ·(tunedᵢ − refᵢ)`: base, ref, then tunedᵢ, refᵢ for each i.

    A model that fills several roles gets the sum of its coefficients; one whose sum is 0 need not run.
    """
    return [scale, 1.0 - scale, *(signed for weight in weights for signed in (weight, -weight))]


def combine(logits: Tensor | Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Σ_t coefficients[t, row] · logits[t][row], [num_rows, vocab_size] float32, not normalised.

    A token that any term with a non-zero coefficient calls impossible (−inf) is impossible. A term contributes nothing,
    whatever it holds, to the rows where its coefficient is 0.

    Args:
        logits: num_terms times [num_rows, vocab_size], floating; padding of the output heads cut or masked already.
        coefficients: [num_terms, num_rows], finite.

    Raises:
        ValueError: shapes differ, a running term has NaN or +inf, or a row has no possible token.
    """
    _check_shapes(logits, coefficients)
    factors = coefficients.to(device=logits[0].device, dtype=torch.float32)
    total = torch.zeros(logits[0].shape, dtype=torch.float32, device=logits[0].device)
    scratch = torch.empty_like(total)
    impossible: Tensor | None = None
    for term, factor in zip(range(len(logits)), factors, strict=True):
        rows = _running_rows(logits[term].float(), factor)
        if _has_impossible(rows, term):
            absent = rows.isneginf()
            impossible = absent if impossible is None else impossible | absent
            rows = rows.masked_fill(absent, 0.0)  # a negative coefficient, or a second −inf, would make NaN of it
        # Two exact steps, not a fused multiply-add: a row's bits must not depend on where in the batch it stands.
        total.add_(torch.mul(rows, factor[:, None], out=scratch))
    return _finish(total, impossible)


def mask_padding(logits: Tensor, num_tokens: int) -> Tensor:
    """Logits [..., vocab_size] with −inf for the ids from `num_tokens` on, which the output head has only as padding.

    Terms with differently padded heads can be combined only when cut to the same `[..., :num_tokens]`.

    Raises:
        ValueError: the head has fewer rows than there are tokens.
    """
    if not 0 < num_tokens <= logits.shape[-1]:
        raise ValueError(f"num_tokens: {num_tokens} tokens do not fit an output head of {logits.shape[-1]} rows")
    if num_tokens == logits.shape[-1]:
        return logits
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= num_tokens, -torch.inf)


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
    if not coefficients.isfinite().all():
        raise ValueError("coefficients: NaN or infinite; give finite numbers")


def _running_rows(rows: Tensor, factor: Tensor) -> Tensor:
    stopped = factor == 0
    return rows.masked_fill(stopped[:, None], 0.0) if stopped.any() else rows  # 0 · inf is NaN


def _has_impossible(rows: Tensor, term: int) -> bool:
    lowest, highest = rows.amin(dim=-1), rows.amax(dim=-1)  # both NaN where one is
    bad = highest.isnan() | highest.isposinf()
    if bad.any():
        raise ValueError(f"logits: term {term} has NaN or +inf in rows {bad.nonzero().flatten().tolist()}")
    return bool(lowest.isneginf().any())


def _finish(total: Tensor, impossible: Tensor | None) -> Tensor:
    if not (total.amin(dim=-1).isfinite() & total.amax(dim=-1).isfinite()).all():
        raise ValueError("coefficients: the combination overflows float32; use smaller ones")
    if impossible is None:
        return total
    total.masked_fill_(impossible, -torch.inf)
    empty = total.amax(dim=-1).isneginf()
    if empty.any():
        raise ValueError(f"logits: no token is possible in rows {empty.nonzero().flatten().tolist()}")
    return total
