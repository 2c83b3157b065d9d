"""From the terms' logits to one distribution a row; rows with and without truncation in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eft_serve.ensemble import Term
from eft_serve.numerics.combine import combine
from eft_serve.numerics.truncate import truncate_weights


def combine_rows(logits: Sequence[Tensor], terms: Sequence[Sequence[Term]], truncate_top_p: Sequence[float]) -> Tensor:
    """Combined logits, [num_rows, vocab_size] float32, not normalised. A row does not depend on its neighbours.

    Args:
        logits: num_terms times [num_rows, vocab_size], floating, without padding.
        terms: of each row, as many as there are logits and in their order.
        truncate_top_p: of each row; where it is 1 nothing is truncated.

    Raises:
        ValueError: a term has NaN or +inf, or a row has no possible token.
    """
    columns = {id(row): [term.coefficient for term in row] for row in terms}  # most rows have one recipe's terms
    coefficients = torch.tensor([columns[id(row)] for row in terms]).T
    is_truncated = [top_p < 1 and any(t.ratio for t in row) for row, top_p in zip(terms, truncate_top_p, strict=True)]
    if not any(is_truncated):
        return combine(logits, coefficients)
    combined = torch.empty(logits[0].shape, dtype=torch.float32, device=logits[0].device)
    truncated = [row for row, is_so in enumerate(is_truncated) if is_so]
    plain = [row for row, is_so in enumerate(is_truncated) if not is_so]
    if plain:
        combined[plain] = combine([term[plain] for term in logits], coefficients[:, plain])
    combined[truncated] = truncate_weights(
        [term[truncated] for term in logits],
        standing=torch.tensor([[term.standing for term in terms[row]] for row in truncated]).T,
        ratio=torch.tensor([[term.ratio for term in terms[row]] for row in truncated]).T,
        top_p=torch.tensor([truncate_top_p[row] for row in truncated], device=combined.device),
    )
    return combined
