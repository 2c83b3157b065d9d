"""Sampling in torch operations, for accelerators; gives the same tokens as `kernels`.

Filters count mass in integers, and the noise is the same hash, so only the last bit of a double precision logarithm may
differ.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.numerics import filters
from eft_serve.numerics.keyed_noise import gumbel
from eft_serve.numerics.sampling_rows import SamplingRows

_MAX_ELEMENTS = 1 << 24  # of one block of rows: the noise takes eight bytes per element


def sample_rows(logits: Tensor, widths: NDArray[np.int64], rows: SamplingRows) -> Tensor:
    """See `sampling.sample_rows`; [num_rows] int64 on the logits' device."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    step = max(1, _MAX_ELEMENTS // logits.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        chosen = rows[part]
        block = logits[part]
        if (widths[part] < logits.shape[1]).any():
            wide = torch.from_numpy(widths[part]).to(logits.device)
            block = block.masked_fill(columns >= wide[:, None], -torch.inf)
        random = np.flatnonzero(chosen.temperature)
        token_ids[part] = _first_largest(block)
        if len(random):
            index = torch.from_numpy(random).to(logits.device)
            scores = filtered_logits(block[index], chosen[random]).double()
            scores += gumbel(chosen.keys[random], columns)
            token_ids[part][index] = _first_largest(scores)
    return token_ids


def filtered_logits(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Logits over temperature, shifted to a maximum of 0, −inf where filtered out; for rows with a temperature > 0.

    Args:
        logits: [num_rows, vocab_size] float32, −inf is impossible.
        rows: how each is sampled.
    """
    # Shifting first keeps a tiny temperature from overflowing the most likely token.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    tempered = shifted / torch.from_numpy(rows.temperature).to(logits.device)[:, None]
    top_k, top_p, log_min_p = (
        torch.from_numpy(values).to(logits.device) for values in (rows.top_k, rows.top_p, rows.log_min_p)
    )
    least = torch.maximum(filters.threshold(tempered, top_p, top_k), log_min_p)
    return tempered.masked_fill_(tempered < least[:, None], -torch.inf)


def _first_largest(rows: Tensor) -> Tensor:
    """The lowest index of each row's maximum, which `argmax` does not guarantee."""
    columns = torch.arange(rows.shape[1], device=rows.device)
    return columns.where(rows == rows.amax(dim=-1, keepdim=True), rows.shape[1]).amin(dim=-1)
