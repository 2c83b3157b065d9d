"""Truncated up-scaling weights: the conservative decoding of arXiv 2310.12962, section 4.5."""

from __future__ import annotations

import torch
from torch import Tensor

from eft_serve.numerics.combine import combine
from eft_serve.numerics.filters import nucleus_threshold
from eft_serve.numerics.logprobs import log_softmax


def truncate_weights(unscaled: Tensor, base: Tensor, reference: Tensor, scale: Tensor, top_p: Tensor) -> Tensor:
    """`unscaled + scale·(base − reference)` where `unscaled` has its top-p nucleus, `unscaled` elsewhere.

    Outside the nucleus the up-scaling ratio counts as 0: nothing is forbidden there. All terms are log-softmaxed here,
    because the two sides of the nucleus share no constant. With `top_p` 1 this is the plain combination.

    Args:
        unscaled: [num_rows, vocab_size], floating: the combination at scale 0, `ref + Σ weightᵢ·(tunedᵢ − refᵢ)`; with
            one fine-tuning of weight 1 from the shared reference that is the tuned model itself, as in the paper.
        base: as `unscaled`, the model that scales up.
        reference: as `unscaled`.
        scale: [num_rows].
        top_p: [num_rows], in [0, 1].

    Returns:
        [num_rows, vocab_size] float32, not normalised.

    Raises:
        ValueError: as `combine`; or `top_p` is out of range.
    """
    if not ((top_p >= 0) & (top_p <= 1)).all():
        raise ValueError("top_p: out of range; give numbers in [0, 1]")
    standing = log_softmax(unscaled)
    ratio = combine([log_softmax(base), log_softmax(reference)], torch.stack([scale, -scale]))
    inside = standing >= nucleus_threshold(standing, top_p)[:, None]
    return standing + ratio.where(inside, 0.0)
