"""Log-probabilities in float32; knows nothing of where logits come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eft_serve.numerics.kernels.describing import describe_rows


def log_softmax(logits: Tensor) -> Tensor:
    """Normalised log-probabilities, float32, over the last dimension; −inf stays −inf.

    Args:
        logits: [..., vocab_size], floating.

    Raises:
        ValueError: a row has NaN or +inf, or no possible token.
    """
    require_possible(logits)
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens of each row, float32, in the shape of `token_ids`.

    Args:
        logits: [num_rows, vocab_size], floating.
        token_ids: [num_rows, num_tokens] int64.

    Raises:
        ValueError: a row has NaN or +inf, or no possible token.
    """
    require_possible(logits)
    return logits.gather(1, token_ids).float() - torch.logsumexp(logits.float(), dim=-1, keepdim=True)


def top_logprobs(logits: Tensor, width: int, token_ids: Sequence[int], num_top: int) -> tuple[Tensor, Tensor]:
    """Each row's token and its most likely tokens, and their log-probabilities.

    Args:
        logits: [num_rows, at least width] float32, contiguous, with a possible token in every row.
        width: columns that count, at least `num_top`.
        token_ids: [num_rows].

    Returns:
        Token ids, [num_rows, 1 + num_top] int64, and their log-probabilities, float32 of the same shape, on the CPU.
    """
    chosen = torch.tensor([token_ids], dtype=torch.int64).T
    if logits.device.type == "cpu":
        top, normalisers = np.empty((len(logits), num_top), np.int64), np.empty(len(logits))
        describe_rows(logits.numpy(), width, top, normalisers)
        described = torch.cat([chosen, torch.from_numpy(top)], dim=1)
        return described, (logits.gather(1, described).double() - torch.from_numpy(normalisers)[:, None]).float()
    rows = logits[:, :width]
    described = torch.cat([chosen.to(logits.device), rows.topk(num_top).indices], dim=1)
    return described.cpu(), token_logprobs(rows, described).cpu()


def require_possible(logits: Tensor) -> Tensor:
    """The largest logit of each row, [...]; raises ValueError where it is not finite (NaN counts as the largest)."""
    peak = logits.amax(dim=-1)
    finite = np.isfinite(peak.float().numpy(force=True))  # a tenth of what torch takes for so few
    if not finite.all():
        rows = (~finite).ravel().nonzero()[0].tolist()
        raise ValueError(f"logits: rows {rows} have NaN, +inf or no possible token; there is nothing to draw from")
    return peak
