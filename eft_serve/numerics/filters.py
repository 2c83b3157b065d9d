"""Top-k, top-p and min-p as one threshold a row: a token survives when its logit reaches it.

Tokens exactly as likely as the last one kept are kept too, so that the result depends on the distribution alone and not
on a sort's order. Full-vocabulary sorts are a last resort: a window of the largest logits decides whenever it holds the
mass that top-p asks for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WINDOWS = (256, 4096)  # how many of the largest logits are looked at before all are


def nucleus_threshold(logits: Tensor, top_p: Tensor, top_k: Tensor | None = None) -> Tensor:
    """The least logit that survives top-k and then top-p of what top-k left; [num_rows], −inf where both are off.

    Top-p keeps a token while the tokens before it hold less than `top_p`; the most likely token always survives.

    Args:
        logits: [num_rows, vocab_size] float32, a finite maximum in each row.
        top_p: [num_rows]; 1 keeps all.
        top_k: [num_rows] integers; 0 keeps all.
    """
    num_rows, vocab_size = logits.shape
    top_k = torch.zeros_like(top_p, dtype=torch.int64) if top_k is None else top_k
    threshold = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=logits.device)
    pending = ((top_p < 1) | ((top_k > 0) & (top_k < vocab_size))).nonzero().flatten()
    for width in (*WINDOWS, vocab_size):
        if pending.numel():
            found, settled = _within_window(logits, pending, min(width, vocab_size), top_p, top_k)
            threshold[pending] = found
            pending = pending[~settled]
    return threshold


def _within_window(logits: Tensor, rows: Tensor, width: int, top_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds of these rows, and whether the `width` largest logits were enough to know them."""
    chosen = logits if len(rows) == len(logits) else logits[rows]
    top_p, top_k = top_p[rows].double()[:, None], top_k[rows].clamp(max=width)[:, None]
    values = _largest(chosen, width)
    kth = values.gather(1, (top_k - 1).clamp(min=0)).where(top_k > 0, -torch.inf)
    # Not logsumexp: softmax sums each row by itself, so that neighbours cannot change a row's last bit.
    probs = _largest(chosen.softmax(dim=-1), width).double().where(values >= kth, 0.0)
    cumulative = probs.cumsum(dim=-1)
    mass = cumulative[:, -1:].where(top_k > 0, 1.0)
    last = ((cumulative - probs) < top_p * mass).sum(dim=-1, keepdim=True).clamp(min=1, max=width) - 1
    nucleus = values.gather(1, last).where(top_p < 1, -torch.inf)
    all_seen = width == logits.shape[1]
    knows_k = (top_k == 0) | (values[:, -1:] < kth)
    knows_p = (top_p == 1) | (cumulative[:, -1:] >= top_p * mass)
    settled = (knows_k & knows_p).flatten() if not all_seen else torch.ones_like(rows, dtype=torch.bool)
    return torch.maximum(kth, nucleus).flatten(), settled


def _largest(rows: Tensor, width: int) -> Tensor:
    """The `width` largest of each row, falling; [num_rows, width]."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.topk(width).values
    start = rows.shape[1] - width  # numpy's vectorised sort takes a tenth of torch's time
    window = np.partition(rows.numpy(), start, axis=-1)[:, start:] if start else rows.numpy()
    return torch.from_numpy(np.sort(window, axis=-1)[:, ::-1].copy())


def min_p_threshold(peak: Tensor, min_p: Tensor) -> Tensor:
    """The least logit whose probability is `min_p` of the most likely token's; [num_rows], −inf where min_p is 0."""
    return peak + min_p.log()
