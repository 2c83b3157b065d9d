"""Each term's log-probabilities of the sampled tokens and of their most likely alternatives.

A term's are of its own logits; those of the combination are of combined or, on request, processed logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from eft_serve.coordinator.request import Request
from eft_serve.numerics.logprobs import token_logprobs, top_logprobs
from eft_serve.numerics.rows import RequestRows
from eft_serve.types import TokenComponents


def describe(
    request: Request,
    rows: RequestRows,
    token_ids: Sequence[int],
    combined: Tensor,
    logprobs: int | None,
    *,
    with_ranks: bool = False,
) -> list[TokenComponents]:
    """Log-probabilities of each token that a request has sampled, under the combination and, if wanted, each term.

    Args:
        request: asks for components or log-probabilities.
        rows: its rows; the tokens were sampled from the first ones.
        token_ids: the sampled tokens.
        combined: [at least num_tokens, at least vocab_size] float32, not normalised: combined or processed logits.
        logprobs: alternatives to each token.
        with_ranks: each token also has its rank.

    Raises:
        ValueError: a term, whatever its coefficient, has NaN, +inf or no possible token in these rows.
    """
    count = len(token_ids)
    generation = request.generation
    num_alternatives = min(max(generation.components or 0, logprobs or 0), rows.vocab_size)
    described, combined_logprobs = top_logprobs(combined[:count], rows.vocab_size, token_ids, num_alternatives)
    if generation.components is None:
        found = _plain(described, combined_logprobs)
    else:
        by_term = torch.stack([token_logprobs(term[:count, : rows.vocab_size], described) for term in rows.logits])
        found = _described(request, described, combined_logprobs, by_term)
    if not with_ranks:
        return found
    own = combined[:count].gather(1, described[:, :1].to(combined.device))
    ranks = (combined[:count, : rows.vocab_size] > own).sum(dim=1) + 1
    return [msgspec.structs.replace(token, rank=rank) for token, rank in zip(found, ranks.tolist(), strict=True)]


def _plain(token_ids: Tensor, logprobs: Tensor) -> list[TokenComponents]:
    """The combination's alone; arguments as in `_described`."""
    rows = zip(token_ids.tolist(), logprobs.tolist(), strict=True)
    return [
        TokenComponents(
            ids[0],
            own[0],
            [],
            [],
            0.0,
            [TokenComponents(i, v, [], [], 0.0) for i, v in zip(ids[1:], own[1:], strict=True)],
        )
        for ids, own in rows
    ]


def _described(request: Request, token_ids: Tensor, logprobs: Tensor, by_term: Tensor) -> list[TokenComponents]:
    """From [num_tokens, 1 + alternatives] and, by term, [num_terms, num_tokens, 1 + alternatives]."""
    combination = request.combination
    index = {term.name: i for i, term in enumerate(combination.terms)}
    tuned, reference = ([index[getattr(r, role)] for r in combination.rewards] for role in ("tuned", "reference"))
    rewards = by_term[tuned].double() - by_term[reference].double()
    weights = torch.tensor(
        [reward.weight for reward in combination.rewards], dtype=torch.float64, device=rewards.device
    )
    total = torch.tensordot(weights, rewards, dims=1)
    columns = (token_ids, logprobs, by_term.movedim(0, -1), rewards.movedim(0, -1), total)
    described = []
    for row in zip(*(column.tolist() for column in columns), strict=True):
        token, *top = (TokenComponents(*values) for values in zip(*row, strict=True))
        described.append(TokenComponents(token.token_id, token.logprob, token.models, token.rewards, token.reward, top))
    return described
