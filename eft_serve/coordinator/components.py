"""What each term says of the tokens that were taken, and of their likeliest alternatives.

Everything is a log-probability of one row of logits: of a term's own, or of the combined ones as they are before
temperature, top-p and the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eft_serve.coordinator.request import Request
from eft_serve.numerics.logprobs import token_logprobs
from eft_serve.types import TokenComponents


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens of one request, and the first of the rows that they were taken from."""

    request: Request
    start: int
    token_ids: list[int]

    @property
    def num_alternatives(self) -> int:
        return self.request.generation.components or 0


def components_of(blocks: Sequence[Block], terms: Sequence[Tensor], combined: Tensor) -> list[list[TokenComponents]]:
    """Those of each block, one for each of its tokens.

    Args:
        blocks: of requests that want components.
        terms: num_terms times [num_rows, vocab_size], floating, without padding.
        combined: [num_rows, vocab_size], not normalised.

    Raises:
        ValueError: a term, of whatever coefficient, has NaN, +inf or no possible token in a block's rows.
    """
    rows = torch.tensor([block.start + i for block in blocks for i in range(len(block.token_ids))])
    chosen = combined[rows]
    num_alternatives = min(max(block.num_alternatives for block in blocks), combined.shape[1])
    token_ids = torch.tensor([token_id for block in blocks for token_id in block.token_ids], device=combined.device)
    token_ids = torch.cat(
        [token_ids[:, None], chosen.topk(num_alternatives).indices], dim=1
    )  # [rows, 1 + alternatives]
    logprobs = token_logprobs(chosen, token_ids)
    by_term = torch.stack([token_logprobs(term[rows], token_ids) for term in terms])
    described, start = [], 0
    for block in blocks:
        part = slice(start, start := start + len(block.token_ids))
        columns = slice(0, 1 + block.num_alternatives)
        described.append(
            _described(block.request, token_ids[part, columns], logprobs[part, columns], by_term[:, part, columns])
        )
    return described


def _described(request: Request, token_ids: Tensor, logprobs: Tensor, by_term: Tensor) -> list[TokenComponents]:
    """One request's, of [num_tokens, 1 + alternatives] and [num_terms, num_tokens, 1 + alternatives]."""
    index = {term.name: i for i, term in enumerate(request.terms)}
    tuned, reference = ([index[getattr(r, role)] for r in request.rewards] for role in ("tuned", "reference"))
    rewards = by_term[tuned].double() - by_term[reference].double()
    weights = torch.tensor([reward.weight for reward in request.rewards], dtype=torch.float64, device=rewards.device)
    total = torch.tensordot(weights, rewards, dims=1)
    columns = (token_ids, logprobs, by_term.movedim(0, -1), rewards.movedim(0, -1), total)
    described = []
    for row in zip(*(column.tolist() for column in columns), strict=True):
        token, *top = (TokenComponents(*values) for values in zip(*row, strict=True))
        described.append(TokenComponents(token.token_id, token.logprob, token.models, token.rewards, token.reward, top))
    return described
