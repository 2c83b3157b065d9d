"""Top-k and top-p as one threshold a row, in torch operations: a token survives when its logit reaches it.

Tokens exactly as likely as the last one kept are kept too, so that the result depends only on the distribution and not
on a sort's order. Mass is counted in integers, whose sums are the same in any order and on any device. The full
vocabulary is sorted only where a window of the largest logits does not contain the threshold.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eft_serve.numerics.exponential import LEAST, LOG_2_HIGH, LOG_2_LOW, MASS_BITS, NO_FRACTIONS, PER_LOG_2, TAYLOR

WINDOWS = (256, 4096)  # number of largest logits tried before the full sort


def mass(x: Tensor) -> Tensor:
    """exp(x) of x ≤ 0, int64 in units of 2⁻⁴⁰, in the shape of `x`; no mass for less than that.

    Rounded as in `kernels`: every product and sum separately, in float32.
    """
    x = x.clamp(min=LEAST)
    y = x * _f32(PER_LOG_2, x) + NO_FRACTIONS
    n = y - NO_FRACTIONS
    r = x - n * _f32(LOG_2_HIGH, x) - n * _f32(LOG_2_LOW, x)
    p = torch.full_like(r, TAYLOR[0])
    for term in TAYLOR[1:]:
        p = p * r + _f32(term, x)
    e = p * r * r + r + 1.0
    return (torch.ldexp(e, n.int()) * 2.0**MASS_BITS).long()


def _f32(number: float, like: Tensor) -> Tensor:
    """A constant rounded before use, as in a compiled kernel."""
    return torch.tensor(number, dtype=torch.float32, device=like.device)


def threshold(shifted: Tensor, top_p: Tensor, top_k: Tensor | None = None) -> Tensor:
    """The smallest logit that survives top-k and then top-p among the rest; [num_rows], −inf where both are off.

    Top-p keeps a token while the tokens before it hold less than `top_p`; the most likely token always survives.

    Args:
        shifted: [num_rows, vocab_size] float32, the largest of each row 0.
        top_p: [num_rows] float32; 1 keeps all.
        top_k: [num_rows] int64; 0 keeps all.
    """
    num_rows, vocab_size = shifted.shape
    top_k = torch.zeros(num_rows, dtype=torch.int64, device=shifted.device) if top_k is None else top_k
    found = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=shifted.device)
    pending = ((top_p < 1) | ((top_k > 0) & (top_k < vocab_size))).nonzero().flatten()
    for width in (*WINDOWS, vocab_size):
        if pending.numel():
            rows = shifted if len(pending) == num_rows else shifted[pending]
            found[pending], settled = _within_window(rows, min(width, vocab_size), top_p[pending], top_k[pending])
            pending = pending[~settled]
    return found


def _within_window(rows: Tensor, width: int, top_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds of these rows, and whether the `width` largest logits were enough to find them."""
    top_p, top_k = top_p.double()[:, None], top_k.clamp(max=width)[:, None]
    values = _largest(rows, width)
    kth = values.gather(1, (top_k - 1).clamp(min=0)).where(top_k > 0, -torch.inf)
    masses = mass(values).where(values >= kth, 0)
    cumulative = masses.cumsum(dim=-1)
    total = cumulative[:, -1:].where(top_k > 0, mass(rows).sum(dim=-1, keepdim=True))
    target = top_p * total.double()
    last = ((cumulative - masses).double() < target).sum(dim=-1, keepdim=True).clamp(min=1, max=width) - 1
    nucleus = values.gather(1, last).where(top_p < 1, -torch.inf)
    if width == rows.shape[1]:
        settled = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    else:
        knows_k = (top_k == 0) | (values[:, -1:] < kth)
        knows_p = (top_p == 1) | (cumulative[:, -1:].double() >= target)
        settled = (knows_k & knows_p).flatten()
    return torch.maximum(kth, nucleus).flatten(), settled


def _largest(rows: Tensor, width: int) -> Tensor:
    """The `width` largest of each row, in descending order; [num_rows, width]."""
    if rows.device.type != "cpu":
        return rows.topk(width).values
    start = rows.shape[1] - width  # numpy's vectorised sort takes a tenth of torch's time
    window = np.partition(rows.numpy(), start, axis=-1)[:, start:] if start else rows.numpy()
    return torch.from_numpy(np.sort(window, axis=-1)[:, ::-1].copy())
