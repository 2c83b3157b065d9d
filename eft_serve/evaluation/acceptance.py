"""How far a draft's distribution is from its target's, and how often speculation accepts the draft's token for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eft_serve.numerics.sampling import sample
from eft_serve.types import SamplingParams


def total_variation(draft: Tensor, target: Tensor) -> Tensor:
    """Half the sum of absolute differences; [num_rows] of probabilities [num_rows, vocab_size].

    Rejection sampling (arXiv 2211.17192) accepts the draft token with probability 1 - this.
    """
    return (draft - target).abs().sum(dim=-1) / 2


def coupled_acceptance(draft: Tensor, target: Tensor) -> Tensor:
    """The probability that both draw the same token from the same Gumbel noise; [num_rows] of positive probabilities.

    Token i wins both draws with probability 1 / sum over j of max(draft_j / draft_i, target_j / target_i). Sorted by
    target / draft, the larger of the two is the draft's ratio before i and the target's from i on, so that two
    cumulative sums give all of them.
    """
    order = (target.log() - draft.log()).argsort(dim=-1)
    p, q = draft.double().gather(-1, order), target.double().gather(-1, order)
    before = p.cumsum(dim=-1) - p
    after = q.flip(-1).cumsum(dim=-1).flip(-1)
    return (1.0 / (before / p + after / q)).sum(dim=-1)


def drawn_acceptance(draft: Tensor, target: Tensor, positions: Tensor, seeds: Sequence[int]) -> Tensor:
    """How often the keyed draws of the product agree over these seeds; [num_rows] of log-probabilities."""
    agreed = torch.zeros(len(positions))
    for seed in seeds:
        params = [SamplingParams(seed=seed)] * len(positions)
        agreed += sample(draft, params, positions.tolist()) == sample(target, params, positions.tolist())
    return agreed / len(seeds)


def tokens_per_verification(agrees: Sequence[bool], block: int) -> tuple[int, int]:
    """Tokens of an answer and the verifications that they took, when up to `block` tokens are drafted at a time.

    Args:
        agrees: for each token of the answer, whether the drafter would have drawn it.
        block: tokens drafted for one verification, which yields one token beyond those accepted.
    """
    place = steps = 0
    while place < len(agrees):
        drafted = list(agrees[place : place + block])
        accepted = drafted.index(False) if False in drafted else len(drafted)
        place += accepted + 1
        steps += 1
    return len(agrees), steps
