"""Log-probabilities in float32; knows nothing of where logits come from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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


def require_possible(logits: Tensor) -> Tensor:
    """The largest logit of each row, [...]; raises ValueError where it is not finite (NaN counts as the largest)."""
    peak = logits.amax(dim=-1)
    finite = np.isfinite(peak.float().numpy(force=True))  # a tenth of what torch takes for so few
    if not finite.all():
        rows = (~finite).ravel().nonzero()[0].tolist()
        raise ValueError(f"logits: rows {rows} have NaN, +inf or no possible token; there is nothing to draw from")
    return peak
