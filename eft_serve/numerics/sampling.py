"""From combined logits to tokens: per-row temperature, top-k, top-p and min-p, in this order, then a keyed draw.

It knows rows and not requests. A row's token depends on its own logits and parameters alone, never on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.numerics.filters import min_p_threshold, nucleus_threshold
from eft_serve.numerics.keyed_noise import MAX_NOISE, MIN_NOISE, gumbel, row_keys, upper_tail
from eft_serve.numerics.logprobs import require_possible

_CPU_BLOCK = 1 << 18  # elements whose intermediate values stay in the cache
_RANGES: dict[str, tuple[float, float]] = {  # NaN is in none
    "temperature": (0, torch.finfo(torch.float32).max),
    "top_k": (0, torch.iinfo(torch.int64).max),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "position": (0, torch.iinfo(torch.int64).max),
}
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
_SPARSE = 8  # survivors are few when they are fewer than one in so many
_SLACK = 1e-4  # more than float32 gets wrong of an exponent that matters


Row = tuple[float, float, float, int, int, int]  # temperature, top_p, min_p, top_k, seed, position


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row is drawn; every tensor is [num_rows].

    Raises:
        ValueError: a parameter is out of its range, or shapes differ; the message names it.
    """

    temperature: Tensor  # floating, ≥ 0; 0 is greedy, the lowest id on ties
    top_k: Tensor  # int64; 0 keeps all
    top_p: Tensor  # floating, in [0, 1]; 1 keeps all, the most likely token always stays
    min_p: Tensor  # floating, in [0, 1]; 0 keeps all
    seed: Tensor  # int64, any bits
    position: Tensor  # int64, of the token within the output

    def __post_init__(self) -> None:
        for name in self.__slots__:
            shape = getattr(self, name).shape
            if shape != self.temperature.shape or len(shape) != 1:
                raise ValueError(f"{name}: shape {tuple(shape)}; every parameter is one number a row")
        for name, (low, high) in _RANGES.items():
            values = getattr(self, name).cpu().numpy()
            within = (values >= low) & (values <= high)
            if not within.all():
                raise ValueError(f"{name}: out of range in rows {(~within).nonzero()[0].tolist()}")

    def __len__(self) -> int:
        return len(self.temperature)

    @property
    def filters(self) -> bool:
        """Whether some row may keep less than all tokens."""
        return bool(self.top_k.count_nonzero() or self.min_p.count_nonzero() or (self.top_p < 1).count_nonzero())

    @classmethod
    def of(cls, rows: Sequence[Row]) -> SamplingRows:
        """The same from one tuple a row."""
        temperature, top_p, min_p = torch.tensor([row[:3] for row in rows]).unbind(1)
        top_k, seed, position = torch.tensor([row[3:] for row in rows]).unbind(1)
        return cls(temperature, top_k, top_p, min_p, seed, position)

    def select(self, rows: Tensor) -> SamplingRows:
        """Those of some rows, [num_selected] int64."""
        return SamplingRows(*(getattr(self, name)[rows] for name in self.__slots__))


def sample(logits: Tensor, params: SamplingRows) -> Tensor:
    """One token for each row, [num_rows] int64.

    Args:
        logits: [num_rows, vocab_size], floating, unnormalised; −inf is impossible.
        params: how to draw, on the same device.

    Raises:
        ValueError: a row has NaN, +inf or no possible token, or there are not as many parameters as rows.
    """
    _check_rows(logits, params)
    token_ids = greedy(logits)
    random = params.temperature.nonzero().flatten()
    if len(random) == len(logits) <= _block_rows(logits):
        return draw(filtered_logits(logits, params), params.seed, params.position)
    for rows in torch.split(random, _block_rows(logits)) if len(random) else ():
        chosen = params.select(rows)
        token_ids[rows] = draw(filtered_logits(logits[rows], chosen), chosen.seed, chosen.position)
    return token_ids


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, [num_rows] int64, the lowest id on ties; raises ValueError as `sample`."""
    token_ids = most_likely(logits)
    require_possible(logits.gather(1, token_ids[:, None]))
    return token_ids


def filtered_logprobs(logits: Tensor, params: SamplingRows) -> Tensor:
    """Log-probabilities of the very distribution that `sample` draws from, [num_rows, vocab_size] float32.

    What was filtered out is −inf; a greedy row has one token at 0. Arguments and errors as in `sample`.
    """
    _check_rows(logits, params)
    require_possible(logits)
    random = params.temperature > 0
    result = torch.full_like(logits, -torch.inf, dtype=torch.float32)
    result.scatter_(1, logits.argmax(dim=-1, keepdim=True), 0.0)
    rows = random.nonzero().flatten()
    if rows.numel():
        result[rows] = torch.log_softmax(filtered_logits(logits[rows], params.select(rows)), dim=-1)
    return result


def filtered_logits(logits: Tensor, params: SamplingRows) -> Tensor:
    """Logits over temperature, shifted to a maximum of 0, −inf where filtered out; for rows with a temperature > 0."""
    # Shifting first keeps a tiny temperature from overflowing the most likely token.
    shifted = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    tempered = shifted.div_(params.temperature.float().clamp(min=_LEAST_TEMPERATURE)[:, None])
    if not params.filters:
        return tempered
    threshold = nucleus_threshold(tempered, params.top_p, params.top_k)
    threshold = torch.maximum(threshold, min_p_threshold(torch.zeros_like(threshold), params.min_p.float()))
    return tempered.masked_fill_(tempered < threshold[:, None], -torch.inf)


def draw(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Gumbel-max: argmax of logits + noise, [num_rows] int64, distributed as softmax(logits) over keys.

    Noise is bounded, so a token further below the most likely one than the noise's whole range cannot win; it and what
    was filtered out cost nothing when few tokens are left. Of many only those get noise that could win with theirs.

    Args:
        logits: [num_rows, vocab_size] float32, a finite maximum in each row.
        seeds, positions: [num_rows] int64, the keys of the noise.
    """
    rows = logits.cpu().numpy()
    keys = row_keys(seeds.cpu().numpy(), positions.cpu().numpy())
    top = rows.argmax(axis=-1)
    behind = rows - rows[np.arange(len(rows)), top][:, None]
    alive = behind >= MIN_NOISE - MAX_NOISE
    if np.count_nonzero(alive) * _SPARSE >= alive.size:
        alive = _contenders(behind, keys, gumbel(keys, top))
    owners, token_ids = alive.nonzero()
    if len(owners) > len(rows):  # somebody is left beside a row's most likely token
        noisy = gumbel(keys[owners], token_ids) + rows[owners, token_ids]
        firsts = np.searchsorted(owners, np.arange(len(rows)))
        best = np.maximum.reduceat(noisy, firsts)
        token_ids = np.minimum.reduceat(np.where(noisy == best[owners], token_ids, rows.shape[1]), firsts)
    return torch.from_numpy(token_ids).to(logits.device)


def _contenders(
    behind: NDArray[np.float32], keys: NDArray[np.uint64], top_noise: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Tokens that may reach the most likely one's score; few, but the winner is always among them.

    Noise of at least x has the upper tail 1 − exp(−exp(−x)) < exp(−x), so a single exponential bounds what can win.

    Args:
        behind: [num_rows, vocab_size], logits less the row's largest.
        keys, top_noise: [num_rows], the latter of the most likely token.
    """
    reach = np.exp(behind - (top_noise - _SLACK).astype(np.float32)[:, None])
    within: NDArray[np.bool_] = upper_tail(keys[:, None], np.arange(behind.shape[1])) <= reach
    return within


def most_likely(logits: Tensor) -> Tensor:
    """As `greedy`, of logits that are known to be finite: NaN would count as the largest."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))  # torch's own takes 13 times as long
    return logits.argmax(dim=-1)


def _block_rows(logits: Tensor) -> int:
    """How many rows to draw at once; an accelerator takes all."""
    return max(1, _CPU_BLOCK // logits.shape[1] if logits.device.type == "cpu" else len(logits))


def _check_rows(logits: Tensor, params: SamplingRows) -> None:
    if logits.dim() != 2 or len(logits) != len(params):
        raise ValueError(f"logits: shape {tuple(logits.shape)} for {len(params)} rows of parameters")
