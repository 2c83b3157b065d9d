"""Truncated up-scaling weights: the conservative decoding of arXiv 2310.12962, section 4.5."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eft_serve.numerics.combine import combine
from eft_serve.numerics.filters import threshold
from eft_serve.numerics.logprobs import log_softmax


def truncate_weights(logits: Tensor | Sequence[Tensor], unscaled: Tensor, ratio: Tensor, top_p: Tensor) -> Tensor:
    """`Σ unscaled·logits`, plus `Σ ratio·logprobs` inside the top-p nucleus of the former.

    Outside the nucleus the up-scaling ratio counts as 0; no token is excluded. The ratio is of log-probabilities,
    because the two sides of the nucleus share no constant. With `top_p` 1 this is the plain combination.

    Args:
        logits: num_terms times [num_rows, vocab_size], floating.
        unscaled: [num_terms, num_rows], the coefficients at scale 0, `ref + Σ weightᵢ·(tunedᵢ − refᵢ)`; with one
            fine-tuning of weight 1 from the shared reference that is the tuned model itself, as in the paper.
        ratio: [num_terms, num_rows], the coefficients of `scale·(base − ref)`.
        top_p: [num_rows], in [0, 1]; of the distribution at scale 0.

    Returns:
        [num_rows, vocab_size] float32, not normalised.

    Raises:
        ValueError: as `combine`; or `top_p` is out of range.
    """
    if not ((top_p >= 0) & (top_p <= 1)).all():
        raise ValueError("top_p: out of range; give numbers in [0, 1]")
    unscaled = combine(logits, unscaled)
    confined = combine([log_softmax(t) if r.any() else t for t, r in zip(logits, ratio, strict=True)], ratio)
    shifted = unscaled - unscaled.amax(dim=-1, keepdim=True)
    inside = shifted >= threshold(shifted, top_p.float())[:, None]
    return unscaled + confined.where(inside, 0.0)
