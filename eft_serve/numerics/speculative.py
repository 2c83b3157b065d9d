"""Which guessed tokens stand: two rules, both exact for the distribution of the combined logits and the parameters.

A *block* is what one request verifies in one step: rows of logits for successive positions, each but possibly the last
with a guess for its token. Tokens are taken from the front until a guess fails; the failing position, or the last one
without a guess, gets a token of the model's own. So a block without guesses is plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from eft_serve.numerics.keyed_noise import row_keys, separate, uniform
from eft_serve.numerics.sampling import SamplingRows, draw, filtered_logprobs

GUESS, ACCEPT, RECOVER = 1, 2, 3  # purposes of the classic rule's three kinds of noise


def take_keyed(drawn: Sequence[int], guesses: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The tokens of each block when a guess stands where it equals the model's own keyed draw.

    What is taken is what plain decoding draws, whoever guessed and however well.

    Args:
        drawn: the model's draw for every row of all blocks, one block after the other, see `sampling.sample`.
        guesses: of each block, one for each of its rows or for all but the last.
        lengths: rows of each block.
    """
    taken, start = [], 0
    for guessed, length in zip(guesses, lengths, strict=True):
        own = drawn[start : start + length]
        matches = next((i for i, (a, b) in enumerate(zip(own, guessed, strict=False)) if a != b), len(guessed))
        taken.append(list(own[: min(matches + 1, length)]))
        start += length
    return taken


def take_classic(
    logits: Tensor,
    guess_logits: Tensor | None,
    params: SamplingRows,
    guesses: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> list[list[int]]:
    """The tokens of each block by rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2302.01318).

    A guess drawn from q stands with probability min(1, p / q); where it falls, the token is drawn from the normalised
    positive part of p − q. Tokens are distributed as by plain decoding, and are not the same ones.

    Args:
        logits: [num_rows, vocab_size] combined, of all blocks.
        guess_logits: [num_rows, vocab_size], what the guesses were drawn from, with the same parameters and the seeds
            of `guess_seeds`; rows without a guess are not looked at. None: the guesses were certain, not drawn.
        params: how each row is drawn.
        guesses, lengths: as in `take_keyed`.
    """
    p = filtered_logprobs(logits, params)
    starts = [0, *accumulate(lengths)][:-1]
    rows = torch.tensor(
        [start + i for start, guessed in zip(starts, guesses, strict=True) for i in range(len(guessed))]
    )
    tokens = torch.tensor([token for guessed in guesses for token in guessed])
    stands: list[bool] = []
    q: Tensor | None = None
    if len(rows):
        chosen = params.select(rows)
        log_ratio = p[rows, tokens]
        if guess_logits is not None:
            q = torch.full_like(p, -torch.inf)
            q[rows] = filtered_logprobs(guess_logits[rows], chosen)
            log_ratio = log_ratio - q[rows, tokens]
        chance = uniform(row_keys(separate(chosen.seed.numpy(), ACCEPT), chosen.position.numpy()))
        stands = (np.log(chance) < log_ratio.double().numpy()).tolist()
    return _taken(p, q, params, guesses, lengths, starts, stands)


def _taken(
    p: Tensor,
    q: Tensor | None,
    params: SamplingRows,
    guesses: Sequence[Sequence[int]],
    lengths: Sequence[int],
    starts: Sequence[int],
    stands: Sequence[bool],
) -> list[list[int]]:
    taken: list[list[int]] = []
    own: list[tuple[int, int, int]] = []  # (block, row, fallen guess or −1) of those that draw a token themselves
    verdicts = iter(stands)
    for block, (guessed, length, start) in enumerate(zip(guesses, lengths, starts, strict=True)):
        marks = [next(verdicts) for _ in guessed]
        num_standing = marks.index(False) if False in marks else len(guessed)
        taken.append(list(guessed[:num_standing]))
        if num_standing < length:
            own.append((block, start + num_standing, guessed[num_standing] if num_standing < len(guessed) else -1))
    if own:
        blocks, rows, fallen = (torch.tensor(column) for column in zip(*own, strict=True))
        left = p[rows]
        fell = (fallen >= 0).nonzero().flatten()
        left[fell] = _residual(left[fell], None if q is None else q[rows[fell]], fallen[fell])
        chosen = params.select(rows)
        drawn = draw(left, torch.from_numpy(separate(chosen.seed.numpy(), RECOVER)), chosen.position)
        for block, token in zip(blocks.tolist(), drawn.tolist(), strict=True):
            taken[block].append(token)
    return taken


def _residual(p: Tensor, q: Tensor | None, fallen: Tensor) -> Tensor:
    """Log of the positive part of p − q, each [num_rows, vocab_size]; of p without the guess when that was certain."""
    if q is None:
        rest = p.scatter(1, fallen[:, None], -torch.inf)
    else:
        rest = (p.double().exp() - q.double().exp()).clamp_(min=0.0).log().float()
    empty = rest.amax(dim=-1, keepdim=True) == -torch.inf  # p and q differ by rounding only
    return p.where(empty, rest)


def guess_seeds(seeds: Tensor) -> Tensor:
    """Seeds for drawing guesses that `take_classic` may judge, int64 [num_rows]: independent of its own noise."""
    return torch.from_numpy(separate(seeds.numpy(), GUESS))
